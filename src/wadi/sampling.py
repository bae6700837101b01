"""Generate latents with a backbone in the role that is active: in one step or in many, and the noise that they start from.

An image depends only on its own seed: noise is drawn per image, on the CPU, as diffusers draws it from a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.diffusion.schedulers import MOST_STEPS, student_scheduler
from wadi.errors import WadiError

DECODED_PIXELS = 2**20  # at once


def student_timestep(backbone: Backbone, timestep: int | None) -> int:
    """Return ``t*``, the timestep at which the student generates: ``timestep``, or the schedule's last if it is None.

    Raises:
        WadiError: if the schedule has no such timestep, or no image can be predicted there.
    """
    last = backbone.process.last_timestep
    timestep = last if timestep is None else timestep
    if timestep > last:
        raise WadiError(f"student.timesteps has {timestep}. The teacher's schedule ends at {last}: set it to that or less.")
    if timestep > backbone.process.last_determined:
        alpha = float(backbone.process.alpha(torch.tensor([timestep])))
        raise WadiError(
            f"At timestep {timestep} the teacher's schedule has alpha = {alpha:.1e} (zero terminal SNR), and the network "
            "predicts noise, which does not determine an image there. Set an earlier student.timesteps, such as [800]."
        )
    return timestep


def student_timesteps(backbone: Backbone, timesteps: Sequence[int]) -> tuple[int, ...]:
    """Return the timesteps at which the student generates: ``timesteps``, or the last of the schedule if there are none.

    Raises:
        WadiError: if they do not fall, the schedule has no such timestep, there are more than eight, no image can be predicted
            at the first, or no scheduler of diffusers generates at exactly these (the message has the nearest that one does).
    """
    if not timesteps:
        return (student_timestep(backbone, None),)
    if list(timesteps) != sorted(set(timesteps), reverse=True) or timesteps[-1] < 1:
        raise WadiError(f"student.timesteps is {list(timesteps)}. Timesteps must be at least 1, and each below the one before.")
    if len(timesteps) > MOST_STEPS:
        raise WadiError(f"student.timesteps has {len(timesteps)} timesteps. Give one to {MOST_STEPS}.")
    student_timestep(backbone, timesteps[0])
    student_scheduler(backbone.pipeline.scheduler, timesteps)
    return tuple(timesteps)


def check_steps(backbone: Backbone, steps: int, name: str = "steps") -> None:
    """Raise `WadiError` if the schedule has fewer timesteps than ``steps``; ``name`` is the option to name in the message."""
    if not 1 <= steps <= backbone.process.num_timesteps:
        raise WadiError(
            f"{name} is {steps}. It must be from 1 to {backbone.process.num_timesteps}, the number of timesteps of the "
            "teacher's schedule."
        )


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Return noise ``N(0, I)``, ``(len(seeds), *shape)``, float32; ``pipe(generator=[manual_seed(s) ...])`` uses the same."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def noises(backbone: Backbone, seeds: Sequence[int], count: int) -> list[Tensor]:
    """Return the noise of ``count`` steps of a student, ``(len(seeds), C, H, W)`` each. The first is that of `noise`.

    Each image has its own generator, as with ``pipe(generator=[manual_seed(s) ...])``.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.cat([torch.randn((1, *backbone.latent_shape), generator=generator) for generator in generators])
    return [z, *(torch.cat([backbone.step_noise(generator) for generator in generators]) for _ in range(count - 1))]


def predict_x0(backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Return the image ``x0`` ``(B, C, H, W)`` that the network predicts at ``x_t``, with ``t`` ``(B,)``."""
    x_t = backbone.as_seen(x_t)
    return backbone.process.x0(backbone.predict(x_t, t, condition), x_t, t)


def one_step(backbone: Backbone, condition: Condition, z: Tensor, timestep: int) -> Tensor:
    """Return ``x0`` ``(B, C, H, W)`` from noise ``z`` by one evaluation; for epsilon-prediction ``(z - sigma eps) / alpha``."""
    return predict_x0(backbone, z, torch.full((len(z),), timestep, device=z.device), condition)


def few_steps(
    backbone: Backbone, condition: Condition, z: Tensor, timesteps: Sequence[int], later: Sequence[Tensor] = ()
) -> Tensor:
    """Return ``x0`` ``(B, C, H, W)`` from noise ``z`` by one evaluation at each of ``timesteps``, the noisiest first.

    Between two of them, the predicted image is noised again. diffusers' `LCMScheduler` does the same.

    Args:
        later: the noise for each timestep after the first, ``(B, C, H, W)`` each.
    """
    x0 = one_step(backbone, condition, z, timesteps[0])
    for timestep, eps in zip(timesteps[1:], later, strict=True):
        t = torch.full((len(z),), timestep, device=z.device)
        x0 = one_step(backbone, condition, backbone.process.add_noise(x0, eps, t), timestep)
    return x0


def predict_guided(
    backbone: Backbone, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, guidance_scale: float
) -> Tensor:
    """Return the network's guided prediction. Rows with prompt and with ``null`` (one row) are computed in one batch."""
    if guidance_scale == 1:
        return backbone.predict(x_t, t, condition)
    both = Condition.cat([condition, null.expand(len(condition))])
    conditional, unconditional = backbone.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
    return backbone.guided(conditional, unconditional, guidance_scale)


@torch.no_grad()
def many_steps(
    backbone: Backbone,
    condition: Condition,
    null: Condition,
    z: Tensor,
    steps: int,
    guidance_scale: float,
    before_step: Callable[[], None] | None = None,
) -> Tensor:
    """Return ``x0`` ``(B, C, H, W)`` from noise ``z`` by the family's deterministic sampler.

    Args:
        before_step: called before each step; may raise an exception to end early.
    Raises:
        WadiError: if the model's schedule has no such number of steps.
    """
    scheduler = backbone.sampler()
    scheduler.set_timesteps(**backbone.sampler_arguments(steps), device=z.device)
    if not torch.as_tensor(scheduler.timesteps).isfinite().all():  # stretching to `shift_terminal` divides by 0
        raise WadiError(f"The model's own schedule cannot be divided into {steps} step. Sample in at least 2 steps.")
    x_t = z * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        if before_step is not None:
            before_step()
        prediction = predict_guided(backbone, x_t, t.expand(len(z)), condition, null, guidance_scale)
        x_t = scheduler.step(prediction, t, x_t).prev_sample
    return x_t


def images_at_once(backbone: Backbone, pixels: int, most: int = 16) -> int:
    """Return how many images have ``pixels`` in all: from one to ``most``."""
    height, width = backbone.resolution
    return min(max(1, pixels // (height * width)), most)


@torch.no_grad()
def decode_in_batches(backbone: Backbone, latents: Tensor) -> Tensor:
    """Return images in ``[0, 1]`` on the CPU, ``(B, 3, height, width)``.

    A megapixel is decoded at once. The decoder of Stable Diffusion needs 3 GiB for it in float32, often more than a step.
    """
    batch = images_at_once(backbone, DECODED_PIXELS)
    return torch.cat([backbone.decode(part).cpu() for part in latents.split(batch)])
