"""The two losses of DreamBooth, per image, and the batch that they are computed on.

    'diffusion'     |F(x_t, t, c) - target|^2 at random t, for the network's own prediction F    (Ruiz et al. 2022)
    'one-step'      |G(z, c) - x_j|^2 for the student's single step G; j is the image paired with z

'one-step' pairs the noises of a batch with its images, nearest first. With random pairs the best answer to every noise would be
the mean of all images: a blur. With nearest pairs the image of a noise is close to what the student generates from it already.

'diffusion' on a student is what LoRA trainers do to a distilled model. It is here for comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.diffusion.schedulers import only_timestep_of
from wadi.extras.balanced import balanced_indices
from wadi.extras.dreambooth.config import DreamboothConfig
from wadi.extras.dreambooth.prior import Prior
from wadi.sampling import one_step


def dreambooth_loss(
    backbone: Backbone,
    subject: Tensor,
    condition: Condition,
    prior: Prior | None,
    config: DreamboothConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one update, and its part on the subject, detached. Both are scalars.

    Subject and class go through the network as one batch.

    Args:
        subject: latents ``(N, C, H, W)`` of the subject's images.
        condition: one row, of the subject's prompt.
    """
    batch = config.batch
    rows = balanced_indices(len(subject), batch, generator)
    x0, conditions = subject[rows], condition.expand(batch)
    z = torch.randn(x0.shape, generator=generator).to(x0.device)
    if prior is not None:
        prior_rows = torch.randint(len(prior.x0), (batch,), generator=generator)
        fresh = torch.randn(x0.shape, generator=generator).to(x0.device)
        x0 = torch.cat([x0, prior.x0[prior_rows]])
        z = torch.cat([z, prior.z[prior_rows] if config.loss == "one-step" else fresh])
        conditions = Condition.cat([conditions, prior.condition[prior_rows]])
    if config.loss == "one-step":
        per_image = _one_step_loss(backbone, x0, z, conditions, batch)
    else:
        per_image = _diffusion_loss(backbone, x0, z, conditions, generator)
    subject_loss = per_image[:batch].mean()
    loss = subject_loss
    if prior is not None:
        loss = loss + config.prior_weight * per_image[batch:].mean()
    return loss, subject_loss.detach()


def _diffusion_loss(backbone: Backbone, x0: Tensor, noise: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
    """Return ``|F(x_t, t, c) - target|^2`` ``(B,)`` at ``t`` uniform over the pipeline's own schedule."""
    process = backbone.process
    t = torch.randint(process.last_timestep + 1, (len(x0),), generator=generator).to(x0.device)
    prediction = backbone.predict(process.add_noise(x0, noise, t), t, condition)
    return (prediction - process.join(x0, noise, t)).square().flatten(1).mean(1)


def _one_step_loss(backbone: Backbone, x0: Tensor, z: Tensor, condition: Condition, batch: int) -> Tensor:
    """Return ``|G(z, c) - x0|^2`` ``(B,)``. The first ``batch`` rows are paired by `pair_nearest`, the others as they are."""
    generated = one_step(backbone, condition, z, only_timestep_of(backbone.pipeline.scheduler, "DreamBooth"))
    targets = torch.cat([x0[:batch][pair_nearest(generated[:batch].detach(), x0[:batch])], x0[batch:]])
    return (generated - targets).square().flatten(1).mean(1)


def pair_nearest(generated: Tensor, images: Tensor) -> Tensor:
    """Return the index ``(B,)`` of the image for each row of ``generated``.

    The nearest pair is taken first, then the nearest of those left, until every image is used once.
    """
    distances = torch.cdist(generated.flatten(1), images.flatten(1))
    index = torch.empty(len(generated), dtype=torch.long, device=generated.device)
    for _ in range(len(generated)):
        row, column = divmod(int(distances.argmin()), distances.shape[1])
        index[row] = column
        distances[row], distances[:, column] = math.inf, math.inf
    return index
