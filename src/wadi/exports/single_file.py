"""One checkpoint file in the layout of Stable Diffusion 1.x, 2.x and SDXL, which ComfyUI, A1111, Forge and diffusers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wadi.backbones import from_pipeline
from wadi.backbones.saving import remove_paths
from wadi.convert import checkpoint_names as names
from wadi.errors import WadiError
from wadi.exports.comfyui import write_workflow
from wadi.exports.source import Source, plain_call
from wadi.exports.written import Written
from wadi.io.quiet import errors_only
from wadi.io.wording import counted

FILE = "model.safetensors"
CONFIG = "config"  # configs and tokenizers of the pipeline, without weights


def write(source: Source, folder: Path, settings: Any) -> Written:
    """Write the checkpoint into ``folder``.

    Raises:
        WadiError: if the student's family or network has no such layout.
    """
    from safetensors.torch import save_file

    pipeline = source.pipeline()
    tensors = checkpoint(pipeline)
    call, steps = plain_call(pipeline)
    reference = source.draw(pipeline, call, steps)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / FILE)
    _write_configs(pipeline, folder / CONFIG)
    kind, dtype = type(pipeline).__name__, source.dtype
    torch_import, argument = ("import torch\n", f", torch_dtype={dtype}") if dtype != torch.float32 else ("", "")
    arguments = "".join(f", {key}={value}" for key, value in call.items())
    return Written(
        title=f"Checkpoint of a student that generates in {counted(steps, 'step')}",
        reference=reference,
        read=lambda: _read(source, folder, type(pipeline), call, steps),
        reader="`from_single_file` of diffusers",
        code=(
            f"{torch_import}from diffusers import {kind}\n\n"
            f'pipe = {kind}.from_single_file(FOLDER + "/{FILE}", config=FOLDER + "/{CONFIG}"{argument})\n'
            f"image = pipe(prompt, num_inference_steps={steps}{arguments}).images[0]\n"
        ),
        sections=[*write_workflow(from_pipeline(pipeline), folder, source.requests()[0][0], FILE), _elsewhere(pipeline, steps)],
        summary=f"checkpoint of {len(tensors)} tensors; README.md has the lines that load it",
        data={"steps": steps, "call": call, "tensors": len(tensors)},
    )


def checkpoint(pipeline: Any) -> dict[str, Tensor]:
    """Return all weights of a pipeline under the names of the original checkpoints.

    Raises:
        WadiError: if the family or the network has no such layout.
    """
    kind = type(pipeline).__name__
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise WadiError(
            f"A {kind} has no checkpoint layout that this command can write; it writes those of Stable Diffusion 1.x, 2.x and "
            "SDXL. Use --to diffusers, or --to lora where diffusers has a LoRA loader for the family."
        )
    config = pipeline.unet.config
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise WadiError(f"The U-Net has {layers} layers per block. A checkpoint file needs one number: use --to diffusers.")
    up_attention = ["CrossAttn" in block for block in config.up_block_types]
    try:
        tensors = names.unet_tensors(pipeline.unet.state_dict(), layers, up_attention)
        tensors |= names.vae_tensors(pipeline.vae.state_dict(), len(pipeline.vae.config.block_out_channels))
        return tensors | _text_tensors(pipeline, kind)
    except KeyError as error:
        raise WadiError(
            f"The student has a tensor {error.args[0]!r}, which the checkpoints of Stable Diffusion 1.x, 2.x and SDXL do not "
            "have. Use --to diffusers."
        ) from error


def _text_tensors(pipeline: Any, kind: str) -> dict[str, Tensor]:
    first = pipeline.text_encoder.state_dict()
    if kind == "StableDiffusionXLPipeline":
        second = pipeline.text_encoder_2.state_dict()
        return names.clip_tensors(first, "conditioner.embedders.0.") | names.open_clip_tensors(
            second, "conditioner.embedders.1."
        )
    if pipeline.unet.config.use_linear_projection:  # SD 2.x, with OpenCLIP
        return names.open_clip_tensors(first, "cond_stage_model.")
    return names.clip_tensors(first, "cond_stage_model.")


def _write_configs(pipeline: Any, folder: Path) -> None:
    """Write the configs and tokenizers of a pipeline, which `from_single_file` otherwise downloads."""
    with errors_only():
        pipeline.save_config(folder)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                model: Any = part  # of diffusers, or of transformers
                save = model.save_config if hasattr(model, "save_config") else model.config.save_pretrained
                save(folder / name)
            elif part is not None:
                part.save_pretrained(folder / name)
    for file in folder.rglob("*.json"):
        remove_paths(file)


def _elsewhere(pipeline: Any, steps: int) -> str:
    kind = "v prediction" if pipeline.scheduler.config.get("prediction_type") == "v_prediction" else "epsilon prediction"
    return (
        f"A1111, Forge and others read `{FILE}` alone. It has no scheduler: set {counted(steps, 'step')}, CFG 1, {kind}, "
        f"and a schedule that starts at the student's timestep, which `{CONFIG}/scheduler/scheduler_config.json` determines."
    )


def _read(source: Source, folder: Path, pipeline_class: Any, call: dict[str, Any], steps: int) -> list[Image.Image]:
    with errors_only():
        pipeline = pipeline_class.from_single_file(
            str(folder / FILE), config=str(folder / CONFIG), local_files_only=True, torch_dtype=source.dtype
        )
    pipeline.set_progress_bar_config(disable=True)
    return source.draw(pipeline.to(torch.device(source.device)), call, steps)
