"""One training step (WaDi, arXiv 2603.08258).

One frozen network computes in three roles: the teacher, the student and the fake model, which models the student's own images.

    x_0 ~ N(0, I),  x0_i = student(x_i, t_i, c),  x_{i+1} = alpha x0_i + sigma eps_i  at t_{i+1}      trajectory.py
    student:     the objective's loss of the image x0_i at one of its timesteps t_i                   objectives/
    fake model:  the objective's loss of stopgrad(x0_i), ``fake.updates`` times

A student of one step has one timestep ``t_0 = t*``, and its image is ``x0_0``. No real image is used. Shapes: latents
``(B, C, H, W)``, timesteps ``(B,)``. Everything except the frozen network's own arithmetic is float32. A step is split into
``config.accumulate`` micro-batches. With several processes each has its own rows of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wadi.backbones import Backbone
from wadi.distill import health, optimizers
from wadi.distill.batch import Batch, replace_rows
from wadi.distill.config import DistillConfig
from wadi.distill.networks import RoleNetworks
from wadi.distill.objectives.base import Loss, Objective, Rows
from wadi.distill.objectives.regression import regression_loss
from wadi.distill.random_draws import Random
from wadi.distill.state import TrainState
from wadi.distill.trajectory import Trajectory, draw_trajectory, start_of

Update = Callable[[TrainState, str, DistillConfig], Tensor]


@dataclass
class StepStats:
    """Measurements of one step: scalars, means over micro-batches and processes. None for a part that the step left out.

    Attributes:
        loss_student, student_grad_norm: of the student's update; the norm is taken before clipping.
        loss_fake, fake_grad_norm: of the fake model's last update.
        distances: `health.distance_sums` between the teacher's and the fake model's predictions.
        of_objective: further scalars that the objective reports.
    """

    loss_student: Tensor | None = None
    student_grad_norm: Tensor | None = None
    loss_fake: Tensor | None = None
    fake_grad_norm: Tensor | None = None
    distances: Tensor | None = None
    of_objective: dict[str, Tensor] = field(default_factory=dict)

    def scalars(self) -> dict[str, Tensor]:
        """Return all scalars by name."""
        fields = ("loss_student", "student_grad_norm", "loss_fake", "fake_grad_norm")
        measured = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return measured | self.of_objective

    def add(self, losses: Sequence[Loss]) -> Tensor:
        """Add what the objective measured in all micro-batches of an update. Return the mean loss."""
        distances = [loss.distances for loss in losses if loss.distances is not None]
        if distances:
            self.distances = torch.stack(distances).sum(0)
        for name in losses[0].statistics:
            self.of_objective[name] = torch.stack([loss.statistics[name] for loss in losses]).mean()
        return torch.stack([loss.value.detach() for loss in losses]).mean()


def as_numbers(stats: StepStats, network: nn.Module) -> dict[str, float]:
    """Return the statistics of a step as plain numbers, with those of both adapters' angles."""
    numbers = {} if stats.distances is None else health.distance_by_timestep(stats.distances)
    numbers |= {name: float(value) for name, value in stats.scalars().items()}
    return numbers | health.angle_stats(network, "student") | health.angle_stats(network, "fake")


def train_step(
    backbone: Backbone,
    batch: Batch,
    timesteps: Sequence[int],
    objective: Objective,
    config: DistillConfig,
    state: TrainState,
    update: Update = optimizers.update,
) -> StepStats:
    """Update the student once, and then the fake model ``fake.updates`` times on the student's images. Communicates.

    Args:
        batch: prompts and noise of this process.
        timesteps: at which the student generates, the noisiest first.
        update: how the gradient of a role becomes an update. `wadi plan` passes one that only drops the gradient.
    """
    step = _Step(RoleNetworks(backbone, batch.null), batch, timesteps, objective, config, state, update)
    warm = config.warm_start
    regressing = state.step < warm.steps
    only_fake = warm.steps <= state.step < warm.steps + warm.fake_steps  # the fake model gets to know the warmed student
    optimizers.set_learning_rates(state, config, objective)
    if only_fake and objective.fake_defaults is not None:
        x0 = step.generate()
    elif regressing:
        x0 = step.regress()
    else:
        x0 = step.update_student()
    if not regressing and objective.fake_defaults is not None:
        for _ in range(config.fake.updates or 1):
            step.update_fake(x0)
    stats = step.stats
    distances = [] if stats.distances is None else [stats.distances]
    state.ranks.average([*stats.scalars().values(), *distances])
    return stats


@dataclass
class _Step:
    """The parts of a step. Each draws its random numbers for the whole step before its first micro-batch."""

    networks: RoleNetworks
    batch: Batch
    timesteps: Sequence[int]
    objective: Objective
    config: DistillConfig
    state: TrainState
    update: Update
    stats: StepStats = field(default_factory=StepStats)

    def update_student(self) -> Tensor:
        """Update the student by the objective's loss. Return the images that it generated before, ``(B, C, H, W)``."""
        objective, batch, process = self.objective, self.batch, self.networks.process
        trajectory = self._trajectory()
        draws = objective.draw_student(batch.z, process, self._random)
        images, losses = [], []
        with optimizers.frozen(self.state, "fake"):  # a loss may reach through the fake model, and trains the student only
            for rows, part in batch.split(self.config.accumulate):
                # without need of the student's images, only those of pairs are generated, for the regression that is kept
                all_used = objective.generates or objective.fake_defaults is not None
                used = part if all_used else part[: len(part.target)]
                x0 = self._student_images(used, trajectory[rows])
                mine = {name: value[rows] for name, value in draws.items()}
                loss = objective.student_loss(
                    self.networks, Rows(x0, part.condition, part.samples, part.sample_condition, mine)
                )
                value = loss.value
                if len(part.target):
                    value = value + self._kept_regression(x0, part, trajectory[rows])
                optimizers.backward(self.state, "student", value / self.config.accumulate)
                images.append(x0.detach())
                losses.append(Loss(value.detach(), loss.distances, loss.statistics))
        self.stats.loss_student = self.stats.add(losses)
        self.stats.student_grad_norm = self.update(self.state, "student", self.config)
        optimizers.update_average(self.state, self.config.student.ema)
        return torch.cat(images)

    def update_fake(self, x0: Tensor) -> None:
        """Update the fake model by the objective's loss on the student's images ``x0``, some of them under the null prompt."""
        batch = self.batch
        draws = self.objective.draw_fake(x0, self.networks.process, self._random)
        condition = replace_rows(batch.condition, draws["null"], batch.null)
        losses = []
        for rows, part in batch.split(self.config.accumulate):
            mine = {name: value[rows] for name, value in draws.items()}
            of_samples = part.sample_condition
            if of_samples is not None:  # the same rows, so that a head cannot tell images apart by their prompts
                of_samples = replace_rows(of_samples, mine["null"], batch.null)
            loss = self.objective.fake_loss(self.networks, Rows(x0[rows], condition[rows], part.samples, of_samples, mine))
            optimizers.backward(self.state, "fake", loss.value / self.config.accumulate)
            losses.append(loss)
        self.stats.loss_fake = self.stats.add(losses)
        self.stats.fake_grad_norm = self.update(self.state, "fake", self.config)

    @torch.no_grad()
    def generate(self) -> Tensor:
        """Return the student's images for the batch without training it, ``(B, C, H, W)``."""
        trajectory = self._trajectory()
        parts = self.batch.split(self.config.accumulate)
        return torch.cat([self._student_images(part, trajectory[rows]) for rows, part in parts])

    # --- the warm start -----------------------------------------------------------------------------------------------------

    def regress(self) -> Tensor:
        """Update the student by regression on the teacher's samples. Return the images that it generated before.

        At its later timesteps, the student learns to denoise the teacher's sample.
        """
        trajectory = self._trajectory()
        images, losses = [], []
        for rows, part in self.batch.split(self.config.accumulate):
            x_t, t = trajectory[rows].noised(part.z, part.target, self.timesteps, self.networks.process)
            x0 = self.networks.student(x_t, t, part.condition)
            loss = regression_loss(x0, part.target)
            optimizers.backward(self.state, "student", loss / self.config.accumulate)
            images.append(x0.detach())
            losses.append(Loss(loss))
        self.stats.loss_student = self.stats.add(losses)
        self.stats.student_grad_norm = self.update(self.state, "student", self.config)
        optimizers.update_average(self.state, self.config.student.ema)
        return torch.cat(images)

    def _kept_regression(self, x0: Tensor, part: Batch, trajectory: Trajectory) -> Tensor:
        """Return the regression loss that is kept during distillation: of the images at the student's first timestep.

        It is weighted so that a step has the mean over all its pairs.
        """
        count = len(part.target)
        share: float | Tensor = count * self.config.accumulate * self.state.ranks.count / part.paired
        first = trajectory.is_first[:count]
        if len(self.timesteps) > 1:  # on average one row in so many is at the first timestep
            share = share * len(self.timesteps) * first.float().mean() if first.any() else 0.0
            x0, target = x0[:count][first], part.target[first]
        else:
            x0, target = x0[:count], part.target
        return self.config.warm_start.weight * share * regression_loss(x0, target) if len(target) else x0.sum() * 0

    # --- images of the student ----------------------------------------------------------------------------------------------

    @property
    def _random(self) -> Random:
        return Random(self.state.generator, self.state.ranks)

    def _trajectory(self) -> Trajectory:
        return draw_trajectory(len(self.timesteps), self.batch.z, self._random)

    def _student_images(self, part: Batch, trajectory: Trajectory) -> Tensor:
        """Return what the student generates at the timestep of each row, from its own images at the timesteps before."""
        if len(part.z) == 0:
            return part.z
        x_t, t = start_of(
            self.networks, part.condition, part.z, self.timesteps, trajectory[: len(part.z)], in_step=self.config.shard
        )
        return self.networks.student(x_t, t, part.condition)
