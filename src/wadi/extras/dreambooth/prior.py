"""Prior preservation: images of the subject's class, generated before training, that the model must keep generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.diffusion.schedulers import only_timestep_of
from wadi.sampling import many_steps, noise, one_step


@dataclass(frozen=True)
class Prior:
    """Latents ``x0`` ``(M, C, H, W)`` that the model generated from noise ``z`` and ``condition``, before training."""

    z: Tensor
    x0: Tensor
    condition: Condition


@torch.no_grad()
def generate_prior(
    backbone: Backbone, prompts: Sequence[str], count: int, seed: int, steps: int, guidance_scale: float, batch: int = 32
) -> Prior:
    """Generate ``count`` latents with the model as it is now, going through ``prompts`` in turn.

    Args:
        seed: seed of the first latent; each of the following adds 1.
        steps: steps of a teacher; 0 for the one step of a student.
    """
    prompt_of_each = [prompts[i % len(prompts)] for i in range(count)]
    z = noise(backbone.latent_shape, range(seed, seed + count)).to(backbone.device)
    condition, null = backbone.encode(prompt_of_each), backbone.encode([""])
    latents = []
    for rows in torch.arange(count).split(batch):
        if steps:
            latents.append(many_steps(backbone, condition[rows], null, z[rows], steps, guidance_scale))
        else:
            latents.append(
                one_step(backbone, condition[rows], z[rows], only_timestep_of(backbone.pipeline.scheduler, "DreamBooth"))
            )
    return Prior(z, torch.cat(latents), condition)
