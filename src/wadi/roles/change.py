"""Change of the norms and directions of weight vectors.

A weight vector is one row of a layer: one output neuron of a ``Linear``, or one filter of a convolution, whose kernel ``(out,
in, kh, kw)`` is read as the matrix ``(out, in kh kw)``. With rows ``w`` of the teacher and ``s`` of the student,

    norm change       abs(|s| - |w|) / |w|
    direction change  1 - cos(w, s) = |s/|s| - w/|w||^2 / 2
    residual          E, with the row s/|s| - w/|w|

so the direction changes of a layer add up to half the squared Frobenius norm of ``E``. The right-hand form of the direction
change keeps small values, which ``1 - cos`` would lose. A row of zero norm has no direction. `compare_rows` uses float64,
and leaves such rows out and counts them. `mean_changes` is the fast form for a training run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 22  # numbers converted to float64 at a time


class Rows(NamedTuple):
    """The change of the rows of a layer.

    Attributes:
        norm: norm changes of the rows that had a norm, ``(n,)`` float64.
        direction: direction changes of the rows that have a direction before and after, ``(m,)`` float64.
        residual: ``E`` ``(out, fan_in)`` float32; zero in rows without a direction.
        undefined: number of rows without a direction before or after.
    """

    norm: Tensor
    direction: Tensor
    residual: Tensor
    undefined: int


@torch.no_grad()
def compare_rows(W: Tensor, S: Tensor, device: torch.device | str = "cpu") -> Rows:
    """Compare the rows of the student's ``S`` with the teacher's ``W``.

    Both are ``(out, ...)`` in one shape and any floating dtype.
    """
    W, S = W.flatten(1), S.flatten(1)
    rows, fan_in = W.shape
    residual = torch.empty(rows, fan_in, dtype=torch.float32, device=device)
    norms, directions, undefined = [], [], 0
    step = max(1, BLOCK // max(1, fan_in))
    for start in range(0, rows, step):
        w, s = (matrix[start : start + step].to(device).double() for matrix in (W, S))
        norm_w, norm_s = w.norm(dim=1), s.norm(dim=1)
        had_norm, directed = norm_w > 0, (norm_w > 0) & (norm_s > 0)
        norms.append(((norm_s - norm_w).abs() / norm_w)[had_norm])
        E = _unit(s, norm_s) - _unit(w, norm_w)
        E[~directed] = 0
        directions.append((E.square().sum(1) / 2)[directed])
        residual[start : start + step] = E
        undefined += int((~directed).sum())
    return Rows(torch.cat(norms), torch.cat(directions), residual, undefined)


def angles_of(direction: Tensor) -> Tensor:
    """Return the angles in radians of direction changes ``1 - cos``, ``(m,)``, without the loss of ``acos`` at small ones."""
    return 2 * (direction / 2).sqrt().clamp(max=1).asin()


def norm_change_of_noise(direction: Tensor, fan_in: int) -> Tensor:
    """Return the norm changes that noise would have on average, whose direction changes are ``direction`` ``(m,)``.

    Isotropic noise on a row ``w`` of n weights adds a part along ``w``, with the variance ``s^2 |w|^2``, and ``n - 1`` parts
    across it, which together have ``(n - 1) s^2 |w|^2``. To second order the parts across give the direction change ``d = (n -
    1) s^2 / 2`` and lengthen the row by as much, so its norm changes by the absolute value of a normal variable with mean
    ``d`` and variance ``2 d / (n - 1)``. This is its mean, as a share of ``|w|``.
    """
    d = direction
    std = (2 * d / max(1, fan_in - 1)).sqrt()
    ratio = torch.where(std > 0, d / std, 0.0)
    return std * math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp() + d * torch.erf(ratio / math.sqrt(2))


@torch.no_grad()
def mean_changes(W: Tensor, S: Tensor) -> Tensor:
    """Return the mean norm change and the mean direction change of the rows, ``(2,)``, on the weights' device.

    The same as the means of `compare_rows`, but in the dtype of ``W``: norm changes below its resolution are rounding. Rows of
    zero norm count as unchanged.
    """
    w, s = W.flatten(1), S.flatten(1)
    norm_w, norm_s = w.norm(dim=1), s.norm(dim=1)
    norm = torch.where(norm_w > 0, (norm_s - norm_w).abs() / norm_w, 0.0)
    direction = (_unit(s, norm_s) - _unit(w, norm_w)).square().sum(1) / 2
    return torch.stack([norm.mean(), torch.where((norm_w > 0) & (norm_s > 0), direction, 0.0).mean()])


def _unit(rows: Tensor, norms: Tensor) -> Tensor:
    """Return rows of norm 1; rows of zero norm stay zero."""
    return rows / torch.where(norms > 0, norms, 1.0)[:, None]


@torch.no_grad()
def exchange_rows(W: Tensor, S: Tensor, take: str) -> Tensor:
    """Return the student's ``S`` with the teacher's norms or directions put back, row by row.

    That is ``s |w|/|s|`` (``take='norm'``) or ``w |s|/|w|`` (``take='direction'``), computed in float64 and returned in the
    shape and dtype of ``S``. A row that would need the direction of a row of zero norm stays the student's.
    """
    w, s = W.flatten(1).double(), S.flatten(1).double()
    norm_w, norm_s = w.norm(dim=1, keepdim=True), s.norm(dim=1, keepdim=True)
    rows, current, target = (s, norm_s, norm_w) if take == "norm" else (w, norm_w, norm_s)
    hybrid = torch.where(current > 0, rows * (target / torch.where(current > 0, current, 1.0)), s)
    return hybrid.view(S.shape).to(S.dtype)
