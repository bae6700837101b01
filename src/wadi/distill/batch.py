"""What a step draws: prompts, noise, timesteps, pairs. The same on every process, each of which keeps its own rows.

All of it comes from the state's one generator and position, in one order, for the whole step's rows; so neither the number of
processes nor that of micro-batches changes what is drawn, and a checkpoint of one world fits another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.backbones import Condition
from wadi.distill.checkpoints import TrainState
from wadi.distill.conditions import Conditions
from wadi.distill.config import DistillConfig
from wadi.distill.run_folder import WARM_START, Run, Stop
from wadi.distill.warm_start import Pairs, load_pairs, make_pairs, save_pairs
from wadi.prompts.order import PromptOrder


@dataclass
class Batch:
    """One step's conditions and noise on one process; noise and prompt of the first ``len(target)`` rows come from pairs."""

    condition: Condition
    null: Condition  # one row
    z: Tensor
    target: Tensor  # (pairs among these rows, C, H, W)
    paired: int = 0  # pairs among the rows of the whole step, on all processes

    def split(self, parts: int) -> Iterator[tuple[slice, Batch]]:
        """``parts`` equal micro-batches, each with the rows it has of this one."""
        size = len(self.z) // parts
        for start in range(0, size * parts, size):
            rows = slice(start, start + size)
            yield rows, Batch(self.condition[rows], self.null, self.z[rows], self.target[rows], self.paired)


def images_per_step(config: DistillConfig, state: TrainState) -> int:
    """Of all processes together."""
    return config.batch * config.accumulate * state.ranks.count


def draw(
    conditions: Conditions, order: PromptOrder, null: Condition, pairs: Pairs | None, config: DistillConfig, state: TrainState
) -> Batch:
    """The next prompts and their noise; while pairs matter, the first rows are pairs: all in the warm start, half later."""
    warm, size, device = config.warm_start, images_per_step(config, state), conditions.backbone.device
    count = 0
    if pairs is not None:
        count = size if state.step < warm.steps else size // 2 if warm.weight > 0 else 0
    rows = order.rows(state.drawn, size - count)
    state.drawn += size - count
    z = torch.randn((len(rows), *conditions.backbone.latent_shape), generator=state.generator)
    paired = torch.arange(size) < count
    target = z[:0]
    if pairs is not None and count:
        chosen = torch.randint(0, len(pairs.rows), (count,), generator=state.generator)
        rows, z = torch.cat([pairs.rows[chosen], rows]), torch.cat([pairs.z[chosen], z])
        target = pairs.x0[state.ranks.own(torch.nn.functional.pad(chosen, (0, size - count)))[state.ranks.own(paired)]]
    own = state.ranks.own(rows).split(config.batch)
    condition = Condition.cat([conditions(part) for part in own])
    return Batch(condition, null, state.ranks.own(z).to(device), target.to(device), count)


def warm_start_pairs(conditions: Conditions, config: DistillConfig, run: Run, order: PromptOrder, stop: Stop) -> Pairs | None:
    """The run's pairs, made once and kept in its folder; every process makes the same, the first one writes.

    Raises:
        Stopped: as `make_pairs`.
    """
    if config.warm_start.pairs == 0:
        return None
    path = run.folder / WARM_START
    if not run.ranks.first(path.exists):
        rows = order.rows(0, config.warm_start.pairs)
        pairs = make_pairs(conditions.backbone, conditions, rows, config.warm_start, config.seed * 1_000_003, stop)
        run.ranks.first(lambda: save_pairs(pairs, path))
    return load_pairs(path, torch.device("cpu"))


def timesteps(low: int, high: int, like: Tensor, state: TrainState) -> Tensor:
    """``U{low .. high - 1}`` for each row of ``like``, ``(B,)``."""
    drawn = torch.randint(low, max(high, low + 1), (len(like) * state.ranks.count,), generator=state.generator)
    return state.ranks.own(drawn).to(like.device)


def gaussian_like(x: Tensor, state: TrainState) -> Tensor:
    """``N(0, I)`` of the shape of ``x``, from the state's generator: the same on any device."""
    drawn = torch.randn((len(x) * state.ranks.count, *x.shape[1:]), generator=state.generator)
    return state.ranks.own(drawn).to(x.device)


def chance(probability: float, like: Tensor, state: TrainState) -> Tensor:
    """True with ``probability`` for each row of ``like``, ``(B,)``."""
    drawn = torch.rand(len(like) * state.ranks.count, generator=state.generator) < probability
    return state.ranks.own(drawn).to(like.device)


def replace_rows(condition: Condition, rows: Tensor, null: Condition) -> Condition:
    """``condition`` with the null prompt in the rows where the mask ``rows`` ``(B,)`` is true."""

    def mixed(name: str, value: Tensor) -> Tensor:
        mask = rows.reshape(-1, *([1] * (value.ndim - 1)))
        return torch.where(mask, null.tensors[name].expand_as(value), value)

    return Condition({name: mixed(name, value) for name, value in condition.tensors.items()})
