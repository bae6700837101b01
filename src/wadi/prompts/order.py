"""The order in which training uses the prompts. It depends only on the seed and the position, so a resumed run continues it."""

from __future__ import annotations

import torch


class PromptOrder:
    """Give the row indices of each batch. Every epoch is shuffled anew, by ``(seed, epoch)`` alone.

    A position counts the rows used so far. A resumed run continues at its position without going through the earlier ones.

    Args:
        count: number of prompts; may be less than a batch.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[offset])

    def rows(self, position: int, batch: int) -> torch.Tensor:
        """Return the indices of the ``batch`` prompts from ``position`` on, shape ``(batch,)``."""
        return torch.tensor([self._row(position + i) for i in range(batch)], dtype=torch.long)
