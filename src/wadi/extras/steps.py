"""More steps of a one-step student: predict, noise again to an earlier time, predict again.

    x0_i = student(x_{t_i}, t_i),   x_{t_{i+1}} = alpha x0_i + sigma eps_i  with alpha, sigma of t_{i+1} and fresh eps_i

Times are trailing: ``t_i = t* (1 - i / n)`` of the student's own ``t*``, evenly spaced, the last one well above 0. One step is
the student's step. This is what diffusers' schedulers for consistency models do, so they are used: `LCMScheduler` over the
betas up to ``t*``, and `FlowMatchLCMScheduler` for rectified flow. A student was taught at ``t*`` alone; whether it gains by
more steps is a matter of measurement (docs/steps.md).

``strength`` below 1 begins at ``strength t*`` instead, from a picture with noise: image to image (`image_to_image`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wadi.diffusion.schedulers import is_flow, one_step_scheduler, timestep_of
from wadi.errors import WadiError

MOST = 50  # steps; more of them is a job for the teacher
# LCM mixes the input into the output by c_skip = s^2 / ((k t)^2 + s^2), s = 1/2, which with its own k of 10 is 1e-8 here: none.
TIMESTEP_SCALING = 1e6


@dataclass(frozen=True)
class Schedule:
    """When a student is asked: a diffusers scheduler, and what the pipeline's call is to be told along with it.

    Attributes:
        scheduler: for ``pipeline.scheduler``.
        call: arguments of the pipeline's call.
        alpha, sigma: of the time it begins at.
    """

    scheduler: Any
    call: dict[str, Any] = field(default_factory=dict)
    alpha: float = 0.0
    sigma: float = 1.0


def schedule(scheduler: Any, steps: int = 1, strength: float = 1.0) -> Schedule:
    """The schedule of ``steps`` steps for a student whose own, one-step ``scheduler`` is given (which is not changed).

    Args:
        strength: share of ``t*`` to begin at, in (0, 1].
    Raises:
        WadiError: if a number is out of range, or the student's schedule has too few timesteps for it.
    """
    check(steps, strength)
    return _flow(scheduler, steps, strength) if is_flow(scheduler) else _preserving(scheduler, steps, strength)


def check(steps: int, strength: float = 1.0) -> None:
    """Raise `WadiError` if ``steps`` or ``strength`` is out of range."""
    if not 1 <= steps <= MOST:
        raise WadiError(f"steps is {steps}. Expected 1 to {MOST}: 1 is what the student was made for.")
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise WadiError(
            f"strength is {strength}. Expected above 0, where the picture stays as it is, and at most 1, where little of it is "
            "left."
        )


def _preserving(scheduler: Any, steps: int, strength: float) -> Schedule:
    from diffusers import LCMScheduler

    first = max(1, round(strength * timestep_of(scheduler)))
    if steps > first:
        raise WadiError(f"Received {steps} steps to go from timestep {first}. Expected at most {first}: raise the strength.")
    refuse_noiseless(scheduler, [round(first * (1 - i / steps)) for i in range(steps)])
    alpha2 = float(scheduler.alphas_cumprod[first].double())
    if steps == 1:
        made: Any = one_step_scheduler(scheduler, first)
    else:
        made = LCMScheduler(
            num_train_timesteps=first + 1,
            trained_betas=torch.as_tensor(scheduler.betas)[: first + 1].tolist(),
            original_inference_steps=first + 1,
            prediction_type=scheduler.config.get("prediction_type", "epsilon"),
            timestep_scaling=TIMESTEP_SCALING,
        )
    return Schedule(made, {"num_inference_steps": steps}, math.sqrt(alpha2), math.sqrt(1 - alpha2))


def refuse_noiseless(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Raise `WadiError` if a variance-preserving schedule adds no noise at one of ``timesteps``.

    An exported scheduler may hold the schedule of its single step alone: all noise in the last beta, none before it.
    """
    alpha_squared = torch.as_tensor(scheduler.alphas_cumprod).tolist()
    for t in timesteps:
        if alpha_squared[t] >= 1:
            raise WadiError(
                f"The scheduler of this pipeline adds no noise at timestep {t}: it only holds the student's single step. Use "
                "one step, no image to start from and no diffusion loss, or run `wadi import-authors` again: it now keeps its "
                "base's schedule."
            )


def _flow(scheduler: Any, steps: int, strength: float) -> Schedule:
    from diffusers import FlowMatchLCMScheduler

    total = int(scheduler.config.num_train_timesteps)
    start = timestep_of(scheduler) / total  # sigma of t*
    first = max(1, round(strength * total * start))
    sigma = first / total
    if steps == 1:
        made: Any = one_step_scheduler(scheduler, first)
        return Schedule(made, {"num_inference_steps": 1}, 1 - sigma, sigma)
    sigmas = [sigma * (1 - i / steps) for i in range(steps)]
    call = {"num_inference_steps": steps, "sigmas": sigmas}
    return Schedule(FlowMatchLCMScheduler(num_train_timesteps=total), call, 1 - sigma, sigma)
