"""LoRA files for diffusers, kohya's tools and ComfyUI, of any student.

A student that was trained as LoRA or DoRA is written as it is. For any other, the change of its weights is approximated: see
`wadi.convert.low_rank`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wadi import roles
from wadi.backbones import Backbone, from_pipeline, load_pipeline
from wadi.backbones.configs import read_config
from wadi.backbones.lazy_tensors import check_same_tensors, network_weights
from wadi.convert.changes_as_lora import Approximation, approximate
from wadi.convert.lora_files import (
    COMFYUI,
    Lora,
    check_has_loader,
    loading_lines,
    read_loras,
    write_lora_tensors,
)
from wadi.diffusion.schedulers import make_scheduler
from wadi.errors import WadiError
from wadi.exports.comfyui import write_workflow
from wadi.exports.source import Source, plain_call
from wadi.exports.written import Written, difference
from wadi.io import markdown
from wadi.io.quiet import errors_only
from wadi.io.wording import counted
from wadi.zoo.paths import resolve_teacher

RANK = 64
CALIBRATION = 8  # images whose inputs to the layers count; other seeds than those of the check
SHOWN = 12  # layers in the card; export.json has all


def write(source: Source, folder: Path, settings: Any) -> Written:
    """Write the LoRA files into ``folder``.

    Raises:
        WadiError: if diffusers cannot load a LoRA into the family's pipeline, or the teacher of a merged pipeline is missing.
    """
    if source.is_merged and source.teacher is None:
        raise WadiError(
            f"{source.run!r} is a merged pipeline. A LoRA is a difference to a teacher: give it as --teacher, or give the run."
        )
    pipeline = source.pipeline(torch.float32)
    backbone = from_pipeline(pipeline)
    check_has_loader(backbone)
    call, steps = plain_call(pipeline)
    reference = source.draw(pipeline, call, steps)
    loras, found = _loras(source, backbone, call, steps, settings.rank)
    loras = {name: _in_dtype(lora, source.dtype) for name, lora in loras.items()}
    write_lora_tensors(backbone, loras, folder)
    scheduler = pipeline.scheduler
    scheduler.save_pretrained(folder / "scheduler")
    is_dora = any(lora.magnitude is not None for lora in loras.values())

    def read() -> list[Image.Image]:
        before, after = _read(source, folder, call, steps)
        without = difference(reference, before)
        data["check_without_lora"] = asdict(without)
        sections.append(f"Without the LoRA, the difference is {without}.")
        return after

    sections = ["`TEACHER` is the pipeline that the student was trained on, `FOLDER` is this folder."]
    if is_dora:
        sections.append("There is no file for ComfyUI: it computes DoRA in another way than PEFT, which trained this one.")
    else:
        teacher = f"{source.base_name.rpartition('/')[2]}.safetensors"
        prompt = source.requests()[0][0]
        sections += [*write_workflow(backbone, folder, prompt, teacher, Path(COMFYUI).name), _comfyui_file()]
    data: dict[str, Any] = {"steps": steps, "call": call, "layers": len(loras)}
    if found is not None:
        sections += _report(found, settings.rank or RANK)
        data |= {"rank": settings.rank or RANK, "lost": found.lost, "losses": [asdict(layer) for layer in found.layers],
                 "outside": found.outside}  # fmt: skip
    lost = "" if found is None else f", which lose {found.lost:.1%} of the squared change"
    return Written(
        title=f"LoRA of a student that generates in {counted(steps, 'step')}",
        reference=reference,
        read=read,
        reader="`load_lora_weights` of diffusers",
        code=loading_lines(backbone, scheduler, steps),
        sections=sections,
        summary=f"LoRA of {len(loras)} layers{lost}; README.md has the lines that load it",
        data=data,
        tags=("lora",),
    )


def _loras(
    source: Source, backbone: Backbone, call: dict[str, Any], steps: int, rank: int | None
) -> tuple[dict[str, Lora], Approximation | None]:
    """Return the LoRA as it was trained, or an approximation of the change with what it loses."""
    if rank is None and not source.is_merged:
        folder, _ = source.locate()
        if roles.read_config(folder).get("peft_type") == "LORA":
            return read_loras(folder), None
    teacher = str(source.teacher_source)
    weights = network_weights(resolve_teacher(teacher))
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.network.state_dict().items()}
    check_same_tensors(shapes, weights, f"Teacher {teacher!r}", "the student")
    others = source.other_requests(CALIBRATION)
    found = approximate(backbone.network, weights, rank or RANK, lambda: source.draw(backbone.pipeline, call, steps, others))
    return found.loras, found


def _comfyui_file() -> str:
    return (
        f"`{COMFYUI}` is the same LoRA under the names that ComfyUI and kohya's tools read. It belongs on the teacher's "
        "checkpoint, at strength 1."
    )


def _in_dtype(lora: Lora, dtype: torch.dtype) -> Lora:
    magnitude = None if lora.magnitude is None else lora.magnitude.to(dtype)
    return Lora(lora.A.to(dtype), lora.B.to(dtype), lora.alpha, magnitude)


def _report(found: Approximation, rank: int) -> list[str]:
    """Return the section about what the LoRA loses."""
    ranks = sorted({k for layer in found.layers for k in layer.by_rank})
    total = markdown.table(("rank", "lost"), [(k, f"{found.lost_at(k):.2%}") for k in ranks])
    largest = sorted(found.layers, key=lambda layer: -layer.change * layer.lost)[:SHOWN]
    layers = markdown.table(
        ("layer", "rank", "change of its output", "lost"),
        [(f"`{layer.name}`", layer.rank, f"{layer.change:.2%}", f"{layer.lost:.2%}") for layer in largest],
    )
    outside = (
        f"{len(found.outside)} tensors changed that a LoRA has no place for (first: `{found.outside[0]}`). They are left out."
        if found.outside
        else ""
    )
    text = (
        f"The student was not trained as a LoRA. This one approximates the change of {len(found.layers)} layers by matrices of "
        f"rank {rank}, such that the outputs of the layers, for inputs from generated images, are as close as possible. Of the "
        f"squared change of the outputs {found.lost:.2%} is lost. `export.json` has all layers."
    )
    return ["## What is lost", text, total, "Layers that lose most:", layers, *([outside] if outside else [])]


def _read(source: Source, folder: Path, call: dict[str, Any], steps: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Return the images of the teacher in the student's steps, and those with the LoRA."""
    pipeline = load_pipeline(resolve_teacher(str(source.teacher_source)), torch.float32, source.device)
    pipeline.scheduler = make_scheduler(read_config(folder, "scheduler"))
    before = source.draw(pipeline, call, steps)
    with errors_only():  # diffusers warns that the text encoders have no LoRA
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    return before, source.draw(pipeline, call, steps)
