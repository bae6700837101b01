"""The inputs of a network that come from the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """All inputs of the network other than ``x_t`` and ``t``: tensors by name, each with the batch as its first dimension."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Condition:
        """Return rows by slice, index tensor or list. The batch dimension is always kept."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """Repeat a single row (such as the null prompt) ``batch`` times, without a copy."""
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move every tensor, as ``Tensor.to`` does."""
        return Condition({k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join several batches into one."""
        names = conditions[0].tensors
        return Condition({k: torch.cat([c.tensors[k] for c in conditions]) for k in names})


def replace_empty_rows(prompts: Sequence[str], null: Tensor, encoded: Tensor) -> Tensor:
    """Return ``encoded`` ``(B, ...)`` with the rows of empty prompts taken from ``null`` ``(B, ...)``."""
    empty = torch.tensor([prompt == "" for prompt in prompts], device=encoded.device)
    return torch.where(empty.view(-1, *([1] * (encoded.ndim - 1))), null, encoded)
