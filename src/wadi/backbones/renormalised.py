"""Guidance that keeps the length of the conditional prediction, as some pipelines compute it."""

from __future__ import annotations

from torch import Tensor


def with_length_of(mixture: Tensor, conditional: Tensor, dim: int) -> Tensor:
    """Return ``mixture`` scaled so that its norms along ``dim`` are those of ``conditional``, which has the same shape."""
    return mixture * (conditional.norm(dim=dim, keepdim=True) / mixture.norm(dim=dim, keepdim=True))
