"""What a student of several steps sees at its later timesteps: its own earlier images, noised (DMD2's backward simulation).

    x_0 = z,  x0_i = student(x_i, t_i, c),  x_{i+1} = alpha x0_i + sigma eps_i,  with alpha and sigma of t_{i+1}

Each image of a training step is at one of the student's timesteps, drawn uniformly. The timesteps before it are computed
without gradient. A student of one step needs none of this: it starts from ``z`` at ``t_0``, and nothing is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.backbones import Condition
from wadi.diffusion.process import Process
from wadi.distill.objectives.base import Networks
from wadi.distill.random_draws import Random


@dataclass(frozen=True)
class Trajectory:
    """The random numbers of the rows of a batch.

    Attributes:
        index: number of the timestep that each row trains, ``(B,)``.
        noises: ``eps_i``, ``(N - 1, B, C, H, W)`` for a student of ``N`` steps.
    """

    index: Tensor
    noises: Tensor

    def __getitem__(self, rows: slice) -> Trajectory:
        return Trajectory(self.index[rows], self.noises[:, rows])

    @property
    def is_first(self) -> Tensor:
        """Whether a row is at the student's first timestep, ``(B,)``."""
        return self.index == 0

    def noised(self, z: Tensor, x0: Tensor, timesteps: Sequence[int], process: Process) -> tuple[Tensor, Tensor]:
        """Return ``(x_t, t)``: ``z`` at the first timestep, and ``x0`` with noise at the later ones."""
        t = torch.tensor(timesteps, device=z.device)[self.index]
        if len(timesteps) == 1:
            return z, t
        eps = self.noises[(self.index - 1).clamp_min(0), torch.arange(len(z), device=z.device)]
        later = process.add_noise(x0, eps, t)
        return torch.where(self.is_first.reshape(-1, *[1] * (z.ndim - 1)), z, later), t


def draw_trajectory(steps: int, like: Tensor, random: Random) -> Trajectory:
    """Draw the trajectory of a student of ``steps`` steps for the rows of ``like`` ``(B, C, H, W)``."""
    if steps == 1:
        return Trajectory(torch.zeros(len(like), dtype=torch.long, device=like.device), like.new_zeros((0, *like.shape)))
    index = random.integers(0, steps, like)
    return Trajectory(index, torch.stack([random.gaussian(like) for _ in range(steps - 1)]))


@torch.no_grad()
def start_of(
    networks: Networks,
    condition: Condition,
    z: Tensor,
    timesteps: Sequence[int],
    trajectory: Trajectory,
    in_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(x_t, t)``, from which each row's image is predicted at its timestep; ``(B, C, H, W)`` and ``(B,)``.

    Args:
        in_step: evaluate the student at every timestep but the last, even if no row needs it. All processes must evaluate a
            sharded network equally often.
    """
    x_t, t = z, torch.tensor(timesteps, device=z.device)[trajectory.index]
    for i, (now, later) in enumerate(itertools.pairwise(timesteps)):
        rows = (trajectory.index > i).nonzero().flatten()
        if len(rows) == 0 and not in_step:
            break
        if len(rows) == 0:
            networks.student(z[:1], t.new_full((1,), now), condition[:1])
            continue
        x0 = networks.student(x_t[rows], t.new_full((len(rows),), now), condition[rows])
        noised = networks.process.add_noise(x0, trajectory.noises[i][rows], t.new_full((len(rows),), later))
        x_t = x_t.index_copy(0, rows, noised)
    return x_t, t
