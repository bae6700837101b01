"""One training step (WaDi, arXiv 2603.08258).

One frozen network computes in three roles: the teacher, the student and the fake model, which models the student's own images.

    z ~ N(0, I),  x0 = student(z, t*, c)                                    one network evaluation
    x_t = alpha_t x0 + sigma_t eps,  t ~ U[0.02 T, 0.98 T]
    g = w(t) (eps_teacher(x_t, t, c) - eps_fake(x_t, t, c))                 without gradient, guided: objectives/vsd.py
    student:     1/2 mean (x0 - stopgrad(x0 - g))^2
    fake model:  denoise stopgrad(x0) at a fresh t ~ U[0, T)                objectives/denoise.py

No real image is used. Shapes: latents ``(B, C, H, W)``, timesteps ``(B,)``. Everything except the frozen network's own
arithmetic is float32. A step is split into ``config.accumulate`` micro-batches. With several processes each has its own rows
of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones import Backbone
from wadi.distill import health, optimizers
from wadi.distill.batch import Batch, chance, gaussian_like, replace_rows, timesteps
from wadi.distill.config import DistillConfig
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.objectives.regression import regression_loss
from wadi.distill.objectives.vsd import vsd_gradient, vsd_loss
from wadi.distill.state import TrainState
from wadi.sampling import one_step, predict_guided

Update = Callable[[TrainState, str, DistillConfig], Tensor]


@dataclass
class StepStats:
    """Measurements of one step: scalars, means over micro-batches and processes. None for a part that the step left out.

    Attributes:
        loss_student, student_grad_norm: of the student's update; the norm is taken before clipping.
        loss_fake, fake_grad_norm: of the fake model's last update.
        distances: `health.distance_sums` between the teacher's and the fake model's predictions.
    """

    loss_student: Tensor | None = None
    student_grad_norm: Tensor | None = None
    loss_fake: Tensor | None = None
    fake_grad_norm: Tensor | None = None
    distances: Tensor | None = None


def as_numbers(stats: StepStats, network: nn.Module) -> dict[str, float]:
    """Return the statistics of a step as plain numbers, with those of both adapters' angles."""
    numbers = {} if stats.distances is None else health.distance_by_timestep(stats.distances)
    scalars = {name: value for name, value in vars(stats).items() if name != "distances" and value is not None}
    numbers |= {name: float(value) for name, value in scalars.items()}
    return numbers | health.angle_stats(network, "student") | health.angle_stats(network, "fake")


def train_step(
    backbone: Backbone,
    batch: Batch,
    timestep: int,
    config: DistillConfig,
    state: TrainState,
    update: Update = optimizers.update,
) -> StepStats:
    """Update the student once, and then the fake model ``fake.updates`` times on the student's images. Communicates.

    Args:
        batch: prompts and noise of this process.
        timestep: ``t*``, at which the student generates.
        update: how the gradient of a role becomes an update. `wadi plan` passes one that only drops the gradient.
    """
    warm = config.warm_start
    regressing = state.step < warm.steps
    only_fake = warm.steps <= state.step < warm.steps + warm.fake_steps  # the fake model gets to know the warmed student
    optimizers.set_learning_rates(state, config)
    stats = StepStats()
    if only_fake:
        x0 = student_images(backbone, batch, timestep, config)
    elif regressing:
        x0 = regression_update(backbone, batch, timestep, config, state, update, stats)
    else:
        x0 = student_update(backbone, batch, timestep, config, state, update, stats)
    if not regressing:
        for _ in range(config.fake.updates):
            fake_update(backbone, x0, batch, config, state, update, stats)
    state.ranks.average([value for value in vars(stats).values() if value is not None])
    return stats


def student_update(
    backbone: Backbone, batch: Batch, timestep: int, config: DistillConfig, state: TrainState, update: Update, stats: StepStats
) -> Tensor:
    """Update the student by the distillation loss. Return the images that it generated before, ``(B, C, H, W)``."""
    process, network = backbone.process, backbone.network
    low, high = (round(fraction * process.num_timesteps) for fraction in config.t_range)
    t, eps = timesteps(low, high, batch.z, state), gaussian_like(batch.z, state)
    images, losses, distances = [], [], []
    for rows, part in batch.split(config.accumulate):
        with roles.active(network, "student"):
            x0 = one_step(backbone, part.condition, part.z, timestep)
        with torch.no_grad():
            x_t = process.add_noise(x0.detach(), eps[rows], t[rows])
            with roles.active(network, None):
                real = predict_guided(backbone, x_t, t[rows], part.condition, part.null, config.guidance_scale)
            with roles.active(network, "fake"):
                fake = predict_guided(backbone, x_t, t[rows], part.condition, part.null, config.fake.guidance_scale)
            gradient = vsd_gradient(x0, x_t, t[rows], real, fake, process, config.student.weighting)
            x0_real, x0_fake = process.x0(real, x_t, t[rows]), process.x0(fake, x_t, t[rows])
            distances.append(health.distance_sums(x0_real, x0_fake, t[rows], process.num_timesteps))
        loss = vsd_loss(x0, gradient)
        if len(part.target):
            loss = loss + kept_regression(x0, part, config, state)
        optimizers.backward(state, "student", loss / config.accumulate)
        images.append(x0.detach())
        losses.append(loss.detach())
    stats.loss_student, stats.student_grad_norm = torch.stack(losses).mean(), update(state, "student", config)
    stats.distances = torch.stack(distances).sum(0)
    optimizers.update_average(state, config.student.ema)
    return torch.cat(images)


def fake_update(
    backbone: Backbone, x0: Tensor, batch: Batch, config: DistillConfig, state: TrainState, update: Update, stats: StepStats
) -> None:
    """Update the fake model by the denoising loss on the student's images ``x0``, some of them under the null prompt."""
    process = backbone.process
    t = timesteps(0, process.num_timesteps, x0, state)
    condition = replace_rows(batch.condition, chance(config.fake.null_probability, x0, state), batch.null)
    eps = gaussian_like(x0, state)
    x_t = process.add_noise(x0, eps, t)
    losses = []
    for rows, _ in batch.split(config.accumulate):
        with roles.active(backbone.network, "fake"):
            prediction = backbone.predict(x_t[rows], t[rows], condition[rows])
        loss = denoising_loss(prediction, x0[rows], eps[rows], x_t[rows], t[rows], process, config.fake.weighting)
        optimizers.backward(state, "fake", loss / config.accumulate)
        losses.append(loss.detach())
    stats.loss_fake, stats.fake_grad_norm = torch.stack(losses).mean(), update(state, "fake", config)


# --- the warm start ---------------------------------------------------------------------------------------------------------


def regression_update(
    backbone: Backbone, batch: Batch, timestep: int, config: DistillConfig, state: TrainState, update: Update, stats: StepStats
) -> Tensor:
    """Update the student by regression on the teacher's samples. Return the images that it generated before."""
    images, losses = [], []
    for _, part in batch.split(config.accumulate):
        with roles.active(backbone.network, "student"):
            x0 = one_step(backbone, part.condition, part.z, timestep)
        loss = regression_loss(x0, part.target)
        optimizers.backward(state, "student", loss / config.accumulate)
        images.append(x0.detach())
        losses.append(loss.detach())
    stats.loss_student, stats.student_grad_norm = torch.stack(losses).mean(), update(state, "student", config)
    optimizers.update_average(state, config.student.ema)
    return torch.cat(images)


@torch.no_grad()
def student_images(backbone: Backbone, batch: Batch, timestep: int, config: DistillConfig) -> Tensor:
    """Return the student's images for a batch without training it, ``(B, C, H, W)``."""
    with roles.active(backbone.network, "student"):
        parts = batch.split(config.accumulate)
        return torch.cat([one_step(backbone, part.condition, part.z, timestep) for _, part in parts])


def kept_regression(x0: Tensor, part: Batch, config: DistillConfig, state: TrainState) -> Tensor:
    """Return the regression loss that is kept during distillation, weighted so that a step has the mean over all its pairs."""
    count = len(part.target)
    share = count * config.accumulate * state.ranks.count / part.paired
    return config.warm_start.weight * share * regression_loss(x0[:count], part.target)
