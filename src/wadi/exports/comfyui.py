"""A ComfyUI workflow that generates as the student does, in the JSON of ComfyUI's API. Its page opens this form too.

ComfyUI counts noise in ``sigma = sqrt((1 - a) / a)`` with ``a`` the cumulative alpha of a timestep. A network receives the
timestep whose sigma of the model's schedule is nearest, so explicit sigmas choose the student's timesteps. Its sampler ``lcm``
predicts the image and adds the noise of the next sigma, as a student of several steps does.

A student starts from pure noise ``z``, which in ComfyUI's units is ``sqrt(1 + sigma^2) z``. ComfyUI multiplies by this number
at the end of the schedule, and by ``sigma`` at any earlier timestep, as if a black image were below the noise. There the
workflow adds the difference with the node ``AddNoise`` from the same seed.

The names of nodes and inputs are those of ComfyUI's ``nodes.py``, ``comfy_extras/nodes_custom_sampler.py`` and
``nodes_model_advanced.py``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from wadi.backbones import Backbone
from wadi.io.wording import counted

WORKFLOW = "comfyui/workflow.json"
KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LENGTH = 1000  # timesteps of ComfyUI's schedule for these models
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction"}


def why_no_workflow(backbone: Backbone) -> str | None:
    """Return why there is no workflow for a student, as the end of a sentence; None if there is one."""
    kind, scheduler = type(backbone.pipeline).__name__, backbone.pipeline.scheduler
    if kind not in KINDS:
        return f"workflows are written for Stable Diffusion 1.x, 2.x and SDXL, not for a {kind}"
    betas = torch.as_tensor(scheduler.betas, dtype=torch.float32)
    usual = torch.linspace(0.00085**0.5, 0.012**0.5, LENGTH, dtype=torch.float64).square()[: len(betas)].float()
    if len(betas) > LENGTH or not torch.allclose(betas, usual, rtol=1e-4):
        return "ComfyUI has no node for the noise schedule of this teacher"
    if scheduler.config.get("prediction_type", "epsilon") not in PREDICTIONS:
        return f"ComfyUI has no node for the prediction type {scheduler.config.prediction_type!r}"
    return None


def sigmas(backbone: Backbone) -> list[float]:
    """Return ``sqrt((1 - a) / a)`` at the timesteps of a student, the noisiest first."""
    alphas = [float(backbone.pipeline.scheduler.alphas_cumprod[t]) for t in backbone.student_timesteps]
    return [math.sqrt((1 - a) / a) for a in alphas]


def workflow(backbone: Backbone, checkpoint: str, lora: str | None = None, prompt: str = "", seed: int = 0) -> dict[str, Any]:
    """Return the workflow as ``{node: {class_type, inputs, _meta}}``. Links are ``[node, output]``.

    Args:
        backbone: of the student's pipeline.
        checkpoint, lora: names of the files in ComfyUI's ``models/checkpoints`` and ``models/loras``.
    """
    nodes: dict[str, Any] = {}

    def add(title: str, class_type: str, **inputs: Any) -> list[Any]:
        nodes[name := str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
        return [name, 0]

    levels = sigmas(backbone)
    height, width = backbone.resolution
    loaded = add("checkpoint", "CheckpointLoaderSimple", ckpt_name=checkpoint)
    model, clip, vae = loaded, [loaded[0], 1], [loaded[0], 2]
    if lora is not None:
        model = add("the student", "LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    sampling = PREDICTIONS[backbone.pipeline.scheduler.config.get("prediction_type", "epsilon")]
    model = add("prediction type", "ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False)
    text = add("prompt", "CLIPTextEncode", text=prompt, clip=clip)
    guider = add("no guidance (CFG 1)", "BasicGuider", model=model, conditioning=text)
    noise = add("seed", "RandomNoise", noise_seed=seed)
    latent = add("size", "EmptyLatentImage", width=width, height=height, batch_size=1)
    if backbone.student_timesteps[0] < LENGTH - 1:
        missing = add("rest of the first noise", "ManualSigmas", sigmas=_text([math.sqrt(1 + levels[0] ** 2) - levels[0]]))
        latent = add("pure noise", "AddNoise", model=model, noise=noise, sigmas=missing, latent_image=latent)
    steps = add("timesteps of the student", "ManualSigmas", sigmas=_text(levels))
    sampler = add("sampler", "KSamplerSelect", sampler_name="lcm")
    parts = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": steps, "latent_image": latent}
    drawn = add("generate", "SamplerCustomAdvanced", **parts)
    image = add("decode", "VAEDecode", samples=drawn, vae=vae)
    add("save", "SaveImage", images=image, filename_prefix="wadi")
    return nodes


def _text(levels: list[float]) -> str:
    """Return sigmas as ``ManualSigmas`` reads them: without exponents, down to 0."""
    return ", ".join(f"{level:.8f}" for level in [*levels, 0.0])


def write_workflow(backbone: Backbone, folder: Path, prompt: str, checkpoint: str, lora: str | None = None) -> list[str]:
    """Write the workflow of a student into ``folder``, if there can be one, and return the card's section about ComfyUI.

    Args:
        prompt: for the text field.
        checkpoint, lora: as in `workflow`.
    """
    steps = len(backbone.student_timesteps)
    if reason := why_no_workflow(backbone):
        return ["## ComfyUI", f"There is no workflow: {reason}. {_settings(steps)}"]
    (folder / WORKFLOW).parent.mkdir(exist_ok=True)
    text = json.dumps(workflow(backbone, checkpoint, lora, prompt), indent=2)
    (folder / WORKFLOW).write_text(text + "\n", encoding="utf-8")
    files = f"`{checkpoint}` in `models/checkpoints`" + (f", `{lora}` in `models/loras`" if lora else "")
    height, width = backbone.resolution
    return [
        "## ComfyUI",
        f"Open `{WORKFLOW}` in ComfyUI. It expects {files}. If your files have other names, choose them in the first nodes. "
        f"The workflow sets {counted(steps, 'step')}, CFG 1, the sampler `lcm`, {width}x{height} pixels, and the sigmas "
        f"`{_text(sigmas(backbone))}` of the student's timesteps {list(backbone.student_timesteps)}.",
    ]


def _settings(steps: int) -> str:
    return (
        f"Set {counted(steps, 'step')}, CFG 1, and a schedule that starts at the student's timestep, which the "
        "`scheduler_config.json` of this export determines."
    )
