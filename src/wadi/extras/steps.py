"""More steps with a one-step student: predict ``x0``, add noise for an earlier time, predict again.

    x0_i = student(x_{t_i}, t_i),   x_{t_{i+1}} = alpha x0_i + sigma eps_i  with alpha, sigma of t_{i+1} and new noise eps_i

The times are ``t_i = t* (1 - i / n)``, evenly spaced from the student's own ``t*``; the last one is well above 0. One step is
the student's step. diffusers' schedulers for consistency models do the same, so we use them: `LCMScheduler` over the betas up
to ``t*``, and `FlowMatchLCMScheduler` for a rectified flow. A student was trained at ``t*`` only; docs/steps.md has
measurements of what more steps change.

With ``strength`` below 1 the schedule begins at ``strength t*``, from an image with noise: image to image (`image_to_image`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wadi.diffusion.schedulers import is_flow, one_step_scheduler, timestep_of
from wadi.errors import WadiError

MOST = 50  # steps; for more of them use the teacher
# LCM mixes the input into the output with the weight c_skip = s^2 / ((k t)^2 + s^2), s = 1/2. This k makes it 1e-8: no mixing.
TIMESTEP_SCALING = 1e6


@dataclass(frozen=True)
class Schedule:
    """The times at which a student predicts.

    Attributes:
        scheduler: for ``pipeline.scheduler``.
        call: arguments that the pipeline's call needs with this scheduler.
        alpha, sigma: at the time where the schedule begins.
    """

    scheduler: Any
    call: dict[str, Any] = field(default_factory=dict)
    alpha: float = 0.0
    sigma: float = 1.0


def schedule(scheduler: Any, steps: int = 1, strength: float = 1.0) -> Schedule:
    """Return the schedule of ``steps`` steps for a student.

    Args:
        scheduler: the student's own one-step scheduler, which is not changed.
        strength: share of ``t*`` to begin at, in (0, 1].
    Raises:
        WadiError: if a number is out of range, or the student's schedule has too few timesteps.
    """
    check_steps_and_strength(steps, strength)
    return _flow(scheduler, steps, strength) if is_flow(scheduler) else _variance_preserving(scheduler, steps, strength)


def check_steps_and_strength(steps: int, strength: float = 1.0) -> None:
    """Raise `WadiError` if ``steps`` or ``strength`` is out of range."""
    if not 1 <= steps <= MOST:
        raise WadiError(f"steps is {steps}. Give 1 to {MOST}; the student was trained for 1.")
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise WadiError(
            f"strength is {strength}. Give a number above 0 (which would leave the image unchanged) and at most 1 (which keeps "
            "little of it)."
        )


def _variance_preserving(scheduler: Any, steps: int, strength: float) -> Schedule:
    from diffusers import LCMScheduler

    first = max(1, round(strength * timestep_of(scheduler)))
    if steps > first:
        raise WadiError(f"Received {steps} steps from timestep {first}. At most {first} are possible: raise the strength.")
    check_noise(scheduler, [round(first * (1 - i / steps)) for i in range(steps)])
    alpha_squared = float(scheduler.alphas_cumprod[first].double())
    if steps == 1:
        new: Any = one_step_scheduler(scheduler, first)
    else:
        new = LCMScheduler(
            num_train_timesteps=first + 1,
            trained_betas=torch.as_tensor(scheduler.betas)[: first + 1].tolist(),
            original_inference_steps=first + 1,
            prediction_type=scheduler.config.get("prediction_type", "epsilon"),
            timestep_scaling=TIMESTEP_SCALING,
        )
    return Schedule(new, {"num_inference_steps": steps}, math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared))


def check_noise(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Raise `WadiError` if a variance-preserving schedule adds no noise at one of ``timesteps``.

    An exported scheduler may hold the schedule of its single step only: all noise in the last beta, none before it.
    """
    alpha_squared = torch.as_tensor(scheduler.alphas_cumprod).tolist()
    for t in timesteps:
        if alpha_squared[t] >= 1:
            raise WadiError(
                f"The scheduler of this pipeline adds no noise at timestep {t}: it only contains the student's single step. "
                "Use one step, no initial image and no diffusion loss, or run `wadi import-authors` again, which now keeps the "
                "schedule of its base."
            )


def _flow(scheduler: Any, steps: int, strength: float) -> Schedule:
    from diffusers import FlowMatchLCMScheduler

    total = int(scheduler.config.num_train_timesteps)
    start = timestep_of(scheduler) / total  # sigma at t*
    first = max(1, round(strength * total * start))
    sigma = first / total
    if steps == 1:
        return Schedule(one_step_scheduler(scheduler, first), {"num_inference_steps": 1}, 1 - sigma, sigma)
    sigmas = [sigma * (1 - i / steps) for i in range(steps)]
    call = {"num_inference_steps": steps, "sigmas": sigmas}
    return Schedule(FlowMatchLCMScheduler(num_train_timesteps=total), call, 1 - sigma, sigma)
