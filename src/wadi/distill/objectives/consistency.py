"""Latent consistency distillation (arXiv 2310.04378): the baseline that needs no score of the student's images.

    x_t = alpha_t y + sigma_t eps,  y a sample of the teacher,  t = t_1 .. t_K, evenly spaced up to the first timestep,
                                    with all timesteps of the student among them
    x_s = one DDIM step of the guided teacher from x_t to the timestep s before t
    loss = mean sqrt((student(x_t, t) - stopgrad(student(x_s, s)))^2 + c^2) - c

At ``s = 0`` the target is the teacher's image itself. There is no fake model. The samples are those of ``warm_start.pairs``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.diffusion.process import Process
from wadi.distill.objectives.base import Draws, Loss, Networks, Objective, Rows, require
from wadi.distill.random_draws import Random


@dataclass(frozen=True)
class ConsistencyOptions:
    """Options of consistency distillation.

    Attributes:
        solver_steps: number of steps that the teacher takes from the student's first timestep to the image.
        huber: ``c`` of the pseudo-Huber loss.
    """

    solver_steps: int = 50
    huber: float = 1e-3

    def __post_init__(self) -> None:
        require(1 <= self.solver_steps <= 1000, "solver_steps", self.solver_steps, "a whole number from 1 to 1,000")
        require(0 < self.huber <= 1e3, "huber", self.huber, "above 0")


def grid(timesteps: Sequence[int], count: int) -> list[int]:
    """Return the ends of ``count`` intervals from 0 to the first of ``timesteps``: evenly spaced, and with all ``timesteps``.

    Raises:
        WadiError: if there are too few intervals for that.
    """
    first = timesteps[0]
    ends = [round(i * first / count) for i in range(count + 1)]
    nearest = [round(t * count / first) for t in timesteps]
    for i, t in zip(nearest, timesteps, strict=True):
        ends[i] = t
    distinct = len(set(nearest)) == len(timesteps) and 0 not in nearest and all(a < b for a, b in itertools.pairwise(ends))
    require(distinct, "solver_steps", count, f"large enough to keep the timesteps {list(timesteps)} apart, and at most {first}")
    return ends


class Consistency(Objective):
    """The loss of consistency along the teacher's own path from noise to image."""

    Options = ConsistencyOptions
    fake_defaults = None
    generates = False
    options: ConsistencyOptions

    @property
    def needs_samples(self) -> bool:
        """Always."""
        return True

    def draw_student(self, like: Tensor, process: Process, random: Random) -> Draws:
        """Draw the number of the interval ``1 .. K``, and noise."""
        return {"interval": random.integers(1, self.options.solver_steps + 1, like), "eps": random.gaussian(like)}

    def time(self, interval: Tensor, process: Process) -> Tensor:
        """Return the timestep at the end of an interval, ``(B,)``; 0 for interval 0."""
        timesteps = self.config.student.timesteps or (process.last_timestep,)
        return torch.tensor(grid(timesteps, self.options.solver_steps), device=interval.device)[interval]

    def student_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the loss. It does not use the student's images ``rows.x0``."""
        process, interval, condition = networks.process, rows.draws["interval"], rows.sample_condition
        assert rows.samples is not None
        assert condition is not None
        t, s = self.time(interval, process), self.time(interval - 1, process)
        x_t = process.add_noise(rows.samples, rows.draws["eps"], t)
        with torch.no_grad():
            x0, eps = process.split(networks.teacher(x_t, t, condition, self.config.guidance_scale), x_t, t)
            earlier = networks.student(process.add_noise(x0, eps, s), s, condition)
            target = torch.where((s == 0).reshape(-1, *[1] * (x0.ndim - 1)), x0, earlier)
        error, c = networks.student(x_t, t, condition) - target, self.options.huber
        return Loss(((error.square() + c**2).sqrt() - c).mean())
