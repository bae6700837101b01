"""The angles of a LoRaD adapter: their size and their rank.

``Theta = A B`` has the shape ``(out, pairs)``, with ``A`` ``(out, r)`` and ``B`` ``(r, pairs)``. So at most ``r`` of its
singular values are not zero. These are the singular values of ``R_A R_B^T``, a matrix of ``r x r``, where ``A = Q_A R_A`` and
``B^T = Q_B R_B``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 314  # of 0.02 rad from -pi to pi
EDGES = tuple(-math.pi + i * 2 * math.pi / BINS for i in range(BINS + 1))


@dataclass(frozen=True)
class Angles:
    """The angles of one layer, in radians.

    Attributes:
        rank: columns of ``A``.
        full: the largest rank that ``Theta`` can have.
        rms, largest: root mean square and largest absolute value.
        beyond: share of angles outside ``[-pi, pi]``; `counts` has them in the outermost bins.
        effective_rank: ``exp`` of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007).
        rank_99: the smallest rank that contains 99 % of ``|Theta|^2``.
        counts: number of angles in each bin between `EDGES`.
    """

    rank: int
    full: int
    rms: float
    largest: float
    beyond: float
    effective_rank: float
    rank_99: int
    counts: tuple[int, ...]


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return the singular values of ``A B``, descending, float64, ``min(out, r, pairs)`` of them.

    ``A B`` itself is never decomposed.
    """
    R_A = torch.linalg.qr(A.double(), mode="r").R
    R_B = torch.linalg.qr(B.double().T, mode="r").R
    return torch.linalg.svdvals(R_A @ R_B.T)


def effective_rank(sigma: Tensor) -> float:
    """Return ``exp(- sum p ln p)`` with ``p = sigma / sum sigma``: ``n`` for n equal values, 0 if all are zero."""
    if not sigma.any():
        return 0.0
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp())


@torch.no_grad()
def describe(A: Tensor, B: Tensor, theta: Tensor) -> Angles:
    """Return the `Angles` of the factors ``A`` and ``B``, whose product is ``theta`` ``(out, pairs)``."""
    sigma = singular_values(A, B)
    energy = sigma.square().cumsum(0)
    inside = theta.flatten().double().clamp(-math.pi, math.pi).cpu()
    counts = torch.histc(inside, BINS, -math.pi, math.pi)
    return Angles(
        rank=A.shape[1],
        full=min(theta.shape),
        rms=float(theta.double().square().mean().sqrt()),
        largest=float(theta.abs().max()),
        beyond=float((theta.abs() > math.pi).double().mean()),
        effective_rank=effective_rank(sigma),
        rank_99=int((energy < 0.99 * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0,
        counts=tuple(int(count) for count in counts),
    )
