"""The random numbers of a step.

All of them come from the run's one generator, on the CPU, in a fixed order, for the whole step. Each process draws everything
and keeps its own rows. So neither the number of processes nor that of micro-batches changes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wadi.parallel.ranks import Ranks


@dataclass(frozen=True)
class Random:
    """Draws for the rows of a tensor ``like`` ``(B, ...)`` that this process holds.

    Attributes:
        generator: of the run.
        ranks: the processes of the run.
    """

    generator: torch.Generator
    ranks: Ranks = field(default_factory=Ranks)

    def integers(self, low: int, high: int, like: Tensor) -> Tensor:
        """Draw from ``{low .. high - 1}`` for each row, for example a timestep; ``(B,)``."""
        drawn = torch.randint(low, max(high, low + 1), (len(like) * self.ranks.count,), generator=self.generator)
        return self.ranks.own(drawn).to(like.device)

    def gaussian(self, like: Tensor) -> Tensor:
        """Draw standard normal noise of the shape of ``like``."""
        drawn = torch.randn((len(like) * self.ranks.count, *like.shape[1:]), generator=self.generator)
        return self.ranks.own(drawn).to(like.device)

    def chance(self, probability: float, like: Tensor) -> Tensor:
        """Draw True with ``probability`` for each row; ``(B,)``."""
        drawn = torch.rand(len(like) * self.ranks.count, generator=self.generator) < probability
        return self.ranks.own(drawn).to(like.device)
