"""Random rows of a small set of images, each equally often."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_indices(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return ``size`` indices below ``count`` in random order, each equally often as far as ``size`` allows."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
    return torch.cat(rounds)[:size]
