"""Low-rank matrices that stand in for the change of a layer: ``dW ~ B A`` with the smallest error of the layer's output.

A layer computes ``y = W x``. Its student's weight is ``W + dW`` ``(out, fan_in)``. With the second moments of its inputs,
``C = E[x x^T]`` ``(fan_in, fan_in)``, the expected squared error of the output under another change ``D`` is

    E |(dW - D) x|^2 = tr((dW - D) C (dW - D)^T)

Among matrices of rank ``r`` it is smallest for ``D = U U^T dW``, where the columns of ``U`` ``(out, r)`` are eigenvectors of
``dW C dW^T`` with the largest eigenvalues (Eckart and Young, for ``dW C^(1/2)``). So ``B = U`` and ``A = U^T dW``: no inverse
of ``C`` is needed, and what remains is the sum of the other eigenvalues, for every rank at once. Without ``C`` this is the
ordinary truncated singular value decomposition.

Kernels ``(out, in, kh, kw)`` are read as matrices ``(out, in kh kw)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Part of the mean second moment that is added to all of them: directions that no input showed then count a little.
DAMPING = 1e-3
SMALLEST = 1e-12  # share of the change; what is below it is rounding


@dataclass(frozen=True)
class LowRank:
    """The best matrices of one layer.

    Attributes:
        A: ``(r, fan_in)`` float32.
        B: ``(out, r)`` float32.
        lost: for rank ``k = 0, 1, ...`` the share of the squared change of the layer's output that ``k`` ranks lose, 1 for
            ``k = 0``. Its length is ``min(out, fan_in) + 1``.
    """

    A: Tensor
    B: Tensor
    lost: Tensor


def nearest(dW: Tensor, rank: int, moments: Tensor | None = None) -> LowRank:
    """Return the change of rank ``rank`` (or of the full rank, if that is less) whose output is closest to that of ``dW``.

    Args:
        dW: ``(out, ...)``.
        moments: ``C``, or a multiple of it; None = all inputs alike.
    """
    change = dW.flatten(1).double()
    C = None if moments is None else _damped(moments.double())
    out, fan_in = change.shape
    Q, R = torch.linalg.qr(change) if out > fan_in else (None, change)  # then the eigenvectors lie in the span of Q
    values, vectors = torch.linalg.eigh(R @ R.T if C is None else R @ C @ R.T)
    values, U = values.flip(0).clamp_min(0), vectors.flip(1)
    U = U if Q is None else Q @ U
    full = min(out, fan_in)
    r, values = min(rank, full), values[:full]
    remaining = values.flip(0).cumsum(0).flip(0)
    total = remaining[0] if remaining[0] > 0 else torch.ones_like(remaining[0])
    lost = torch.cat([remaining, remaining.new_zeros(1)]) / total
    lost[lost < SMALLEST] = 0
    B = U[:, :r]
    A = B.T @ change
    scale = A.norm(dim=1).sqrt().clamp_min(1e-30)  # share the size between the two, so that half precision holds both
    return LowRank((A / scale[:, None]).float().contiguous(), (B * scale).float().contiguous(), lost.float())


def _damped(C: Tensor) -> Tensor:
    mean = C.diagonal().mean()
    return C + torch.eye(len(C), dtype=C.dtype, device=C.device) * (DAMPING * mean if mean > 0 else 1.0)
