"""Import the authors' released students: full state dicts that were trained to generate at t = 999 with alpha^2 = 0.0047.

This is the value of Stable Diffusion's schedule. The authors also used it for PixArt, whose schedule has 4.0e-5 there. It is
the only place in this package where alpha does not come from the model's scheduler. At all earlier timesteps the base's
schedule holds, so starting from an image and using more steps work as for other students.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wadi.backbones import from_pipeline, load_pipeline
from wadi.backbones.lazy_tensors import LazyTensors, check_same_tensors
from wadi.backbones.saving import save_pipeline
from wadi.errors import WadiError
from wadi.io.outputs import check_out
from wadi.io.weight_checks import check_finite
from wadi.zoo.paths import resolve_teacher

TIMESTEP = 999
ALPHA_SQUARED = 0.0047


def released_scheduler(base: Any) -> Any:
    """Return DDIM over the betas of the scheduler ``base``, except the last: there ``alpha^2`` becomes 0.0047, at t = 999.

    Its single step is ``(z - sqrt(1 - 0.0047) eps) / sqrt(0.0047)``. The last beta is negative where the base's own
    ``alpha^2`` is already smaller, as in PixArt.

    Raises:
        WadiError: if the base's schedule is not that of 1,000 timesteps.
    """
    from diffusers import DDIMScheduler

    betas = torch.as_tensor(base.betas).float()
    if len(betas) != TIMESTEP + 1:
        raise WadiError(
            f"The base's schedule has {len(betas)} timesteps. The authors' students need one of {TIMESTEP + 1}: give the "
            "pipeline they were made from as --base."
        )
    before = float(torch.as_tensor(base.alphas_cumprod)[TIMESTEP - 1].double())
    return DDIMScheduler(
        num_train_timesteps=TIMESTEP + 1,
        trained_betas=[*betas[:TIMESTEP].tolist(), 1 - ALPHA_SQUARED / before],
        prediction_type="epsilon",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,  # not used by trailing spacing; diffusers warns of any other value
    )


def import_authors(file: Path, base: str, out: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write ``out``: a pipeline like ``base`` with the weights of ``file``, which generates in one step without this package.

    Args:
        file: a released ``rotated_unet*.safetensors`` or ``rotated_transformer.safetensors``.
        base: folder or Hub id of the pipeline that the weights belong to.
    Raises:
        WadiError: if the file cannot be read, belongs to another network or contains angles; if ``base`` does not predict
            epsilon; or if ``out`` exists.
    """
    check_out(out)
    weights = LazyTensors([file])
    angles = [name for name in weights if name.endswith(("theta_a", "theta_b"))]
    if angles:
        raise WadiError(
            f"{str(file)!r} contains angles (first: {angles[0]}), so its weights may not be rotated yet. Give a state dict "
            "with the rotation merged, as the authors released them."
        )
    pipeline = load_pipeline(resolve_teacher(base), dtype)
    backbone = from_pipeline(pipeline)
    if backbone.process.prediction != "epsilon":
        raise WadiError(
            f"{base!r} predicts {backbone.process.prediction}. The authors' students predict epsilon: give such a pipeline."
        )
    expected = backbone.network.state_dict()
    check_same_tensors({name: tuple(tensor.shape) for name, tensor in expected.items()}, weights, f"{str(file)!r}", repr(base))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])
    check_finite(f"{str(file)!r}", expected)
    pipeline.scheduler = released_scheduler(pipeline.scheduler)
    save_pipeline(pipeline, out)
    return pipeline
