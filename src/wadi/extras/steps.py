"""The steps of a student: predict ``x0``, add noise for an earlier time, predict again.

    x0_i = student(x_{t_i}, t_i),   x_{t_{i+1}} = alpha x0_i + sigma eps_i  with alpha, sigma of t_{i+1} and new noise eps_i

A student generates at the timesteps that it was trained for. Another number of steps is possible: the times are then ``t_i = t*
(1 - i / n)``, evenly spaced from the student's own ``t*``; the last one is well above 0. diffusers' schedulers for consistency
models do the same, so we use them: `LCMScheduler` over the betas up to ``t*``, and `FlowMatchLCMScheduler` for a flow.
docs/steps.md has measurements of what it changes.

With ``strength`` below 1 the schedule begins at ``strength t*``, from an image with noise: image to image (`image_to_image`). A
student of several steps begins at its own timestep nearest to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from wadi.diffusion.schedulers import TIMESTEP_SCALING, is_flow, one_step_scheduler, timestep_of
from wadi.errors import WadiError
from wadi.io.progress import console
from wadi.io.wording import counted

MOST = 50  # steps; for more of them use the teacher


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


def student_schedule(scheduler: Any, trained: Sequence[int], steps: int | None = None, strength: float = 1.0) -> Schedule:
    """Return the schedule of a student in its own steps, or in ``steps`` steps. Print a line if it was trained for others.

    Args:
        scheduler: the student's own, which is not changed.
        trained: the timesteps that it was trained for, the noisiest first.
        steps: None = as many as it was trained for.
        strength: share of the first timestep to begin at, in (0, 1].
    Raises:
        WadiError: see `schedule`.
    """
    count = len(trained)
    steps = count if steps is None else steps
    if steps != count:
        console.print(
            f"[yellow]This student was trained for {counted(count, 'step')} (t* = "
            f"{', '.join(map(str, trained))}), and generates in {steps}: images are usually worse. See docs/steps.md.[/]",
            soft_wrap=True,
        )
        return schedule(scheduler, steps, strength)
    check_steps_and_strength(steps, strength)
    if count == 1:
        return schedule(scheduler, 1, strength) if strength < 1 else Schedule(scheduler)
    rest = trained[min(range(count), key=lambda i: abs(trained[i] - strength * trained[0])) :]
    if len(rest) == count:
        return replace(schedule(scheduler, count), scheduler=scheduler, call={"num_inference_steps": count})
    return at_timesteps(scheduler, rest)


def at_timesteps(scheduler: Any, timesteps: Sequence[int]) -> Schedule:
    """Return the schedule at exactly ``timesteps``, the noisiest first: any part of those that the student was trained for.

    Args:
        scheduler: the student's own, which is not changed.
    Raises:
        WadiError: if the student's schedule adds no noise at one of them.
    """
    first, count = timesteps[0], len(timesteps)
    if is_flow(scheduler):
        total = int(scheduler.config.num_train_timesteps)
        return _flow_at(scheduler, [timestep / total for timestep in timesteps])
    check_noise(scheduler, timesteps)
    call = {"num_inference_steps": count} | ({"timesteps": list(timesteps)} if count > 1 else {})
    return Schedule(_until(scheduler, first, count), call, *_levels(scheduler, first))


def schedule(scheduler: Any, steps: int = 1, strength: float = 1.0) -> Schedule:
    """Return the schedule of ``steps`` steps for a student.

    Args:
        scheduler: the student's own, which is not changed.
        strength: share of ``t*`` to begin at, in (0, 1].
    Raises:
        WadiError: if a number is out of range, or the student's schedule has too few timesteps.
    """
    check_steps_and_strength(steps, strength)
    return _flow(scheduler, steps, strength) if is_flow(scheduler) else _variance_preserving(scheduler, steps, strength)


def check_steps_and_strength(steps: int, strength: float = 1.0) -> None:
    """Raise `WadiError` if ``steps`` or ``strength`` is out of range."""
    if not 1 <= steps <= MOST:
        raise WadiError(f"steps is {steps}. Give 1 to {MOST}.")
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise WadiError(
            f"strength is {strength}. Give a number above 0 (which would leave the image unchanged) and at most 1 (which keeps "
            "little of it)."
        )


def _variance_preserving(scheduler: Any, steps: int, strength: float) -> Schedule:
    first = max(1, round(strength * timestep_of(scheduler)))
    if steps > first:
        raise WadiError(f"Received {steps} steps from timestep {first}. At most {first} are possible: raise the strength.")
    check_noise(scheduler, [round(first * (1 - i / steps)) for i in range(steps)])
    return Schedule(_until(scheduler, first, steps), {"num_inference_steps": steps}, *_levels(scheduler, first))


def _until(scheduler: Any, first: int, steps: int) -> Any:
    """Return a scheduler over the betas up to timestep ``first``: DDIM for one step, else `LCMScheduler`."""
    from diffusers import LCMScheduler

    if steps == 1:
        return one_step_scheduler(scheduler, first)
    return LCMScheduler(
        num_train_timesteps=first + 1,
        trained_betas=torch.as_tensor(scheduler.betas)[: first + 1].tolist(),
        original_inference_steps=first + 1,
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_scaling=TIMESTEP_SCALING,
    )


def _levels(scheduler: Any, timestep: int) -> tuple[float, float]:
    """Return ``(alpha, sigma)`` at a timestep of a variance-preserving schedule."""
    alpha_squared = float(scheduler.alphas_cumprod[timestep].double())
    return math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared)


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
    total = int(scheduler.config.num_train_timesteps)
    start = timestep_of(scheduler) / total  # sigma at t*
    sigma = max(1, round(strength * total * start)) / total
    return _flow_at(scheduler, [sigma * (1 - i / steps) for i in range(steps)])


def _flow_at(scheduler: Any, sigmas: list[float]) -> Schedule:
    from diffusers import FlowMatchLCMScheduler

    total, sigma, count = int(scheduler.config.num_train_timesteps), sigmas[0], len(sigmas)
    if count == 1:
        one = one_step_scheduler(scheduler, round(sigma * total))
        return Schedule(one, {"num_inference_steps": 1}, 1 - sigma, sigma)
    call = {"num_inference_steps": count, "sigmas": sigmas}
    return Schedule(FlowMatchLCMScheduler(num_train_timesteps=total), call, 1 - sigma, sigma)
