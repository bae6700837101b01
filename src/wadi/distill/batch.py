"""The inputs of one step: prompts, noise, and the teacher's samples.

All of it comes from the state's one generator and its position in the prompts, in a fixed order, for the whole step
(`random_draws.py`), so a checkpoint fits any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wadi.backbones import Condition
from wadi.distill.conditions import Conditions
from wadi.distill.config import DistillConfig
from wadi.distill.random_draws import Random
from wadi.distill.samples import Samples
from wadi.distill.state import TrainState
from wadi.distill.warm_start import Pairs
from wadi.prompts.order import PromptOrder


@dataclass
class Batch:
    """Prompts and noise of one step on one process.

    Attributes:
        condition: of ``B`` prompts.
        null: of the null prompt, one row.
        z: noise, ``(B, C, H, W)``.
        target: the teacher's samples for the first ``len(target)`` rows, whose noise and prompts come from warm-start pairs.
        paired: number of rows from pairs in the whole step, on all processes.
        samples: images of the teacher for objectives that need some, ``(B, C, H, W)``; None for others.
        sample_condition: their prompts.
    """

    condition: Condition
    null: Condition
    z: Tensor
    target: Tensor
    paired: int = 0
    samples: Tensor | None = None
    sample_condition: Condition | None = None

    def __getitem__(self, rows: slice) -> Batch:
        """Return a part of the batch."""
        samples = None if self.samples is None else self.samples[rows]
        prompts = None if self.sample_condition is None else self.sample_condition[rows]
        return Batch(self.condition[rows], self.null, self.z[rows], self.target[rows], self.paired, samples, prompts)

    def split(self, parts: int) -> Iterator[tuple[slice, Batch]]:
        """Yield ``parts`` equal micro-batches, each with the slice of this batch that it holds."""
        size = len(self.z) // parts
        for start in range(0, size * parts, size):
            rows = slice(start, start + size)
            yield rows, self[rows]


def images_per_step(config: DistillConfig, process_count: int) -> int:
    """Return the number of images of one step, of all processes together."""
    return config.batch * config.accumulate * process_count


def draw_batch(
    conditions: Conditions,
    order: PromptOrder,
    null: Condition,
    pairs: Pairs | None,
    config: DistillConfig,
    state: TrainState,
    samples: Samples | None = None,
) -> Batch:
    """Draw the next prompts and their noise.

    With warm-start pairs, the first rows are pairs: all rows during the warm start, half of them afterwards if
    ``warm_start.weight`` is above 0.

    Args:
        samples: of the objective; None if it needs none.
    """
    warm, size, device = config.warm_start, images_per_step(config, state.ranks.count), conditions.backbone.device
    count = 0
    if pairs is not None:
        count = size if state.step < warm.steps else size // 2 if warm.weight > 0 else 0
    rows = order.rows(state.prompts_drawn, size - count)
    state.prompts_drawn += size - count
    z = torch.randn((len(rows), *conditions.backbone.latent_shape), generator=state.generator)
    from_pairs = torch.arange(size) < count
    target = z[:0]
    if pairs is not None and count:
        chosen = torch.randint(0, len(pairs.rows), (count,), generator=state.generator)
        rows, z = torch.cat([pairs.rows[chosen], rows]), torch.cat([pairs.z[chosen], z])
        target = pairs.x0[state.ranks.own(torch.nn.functional.pad(chosen, (0, size - count)))[state.ranks.own(from_pairs)]]
    own_rows = state.ranks.own(rows).split(config.batch)
    condition = Condition.cat([conditions(part) for part in own_rows])
    batch = Batch(condition, null, state.ranks.own(z).to(device), target.to(device), count)
    if samples is None:
        return batch
    drawn = Random(state.generator, state.ranks).integers(0, len(samples.x0), batch.z).cpu()
    prompts = Condition.cat([samples.conditions(part) for part in drawn.split(config.batch)])
    return replace(batch, samples=samples.x0[drawn].to(device), sample_condition=prompts)


def replace_rows(condition: Condition, rows: Tensor, null: Condition) -> Condition:
    """Return ``condition`` with the null prompt in the rows where the mask ``rows`` ``(B,)`` is true."""

    def mixed(name: str, value: Tensor) -> Tensor:
        mask = rows.reshape(-1, *([1] * (value.ndim - 1)))
        return torch.where(mask, null.tensors[name].expand_as(value), value)

    return Condition({name: mixed(name, value) for name, value in condition.tensors.items()})
