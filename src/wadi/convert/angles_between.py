"""The rotation that turns one weight into another: angles, low-rank factors, and the share of the change they explain.

Neighbouring columns of a row of ``W`` are a pair ``w = w_e + i w_o``. A rotation by ``theta`` makes it ``w e^{i theta}``. So
two weights determine the angle that brings each pair of one closest to the other:

    theta = arg(conj(w) s) = atan2(w_e s_o - w_o s_e, w_e s_e + w_o s_o)

A rotation cannot change the lengths of the pairs; that part of the change remains. The best rank-R matrix near ``Theta``
``(out, fan_in // 2)`` is its truncated singular value decomposition ``U S V^T``, split into ``A = U sqrt(S)`` and ``B =
sqrt(S) V^T``. For weights that LoRaD made, with angles below half a turn, ``Theta`` is ``A B`` itself, and only rounding is
lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer from teacher to student.

    Attributes:
        norm_change: mean over rows of ``abs(|s| - |w|) / |w|``.
        direction_change: mean over rows of ``1 - cos(w, s)``.
        angle_rms: root mean square of the angles, in radians.
        change: ``|S - W| / |W|``, Frobenius.
        rotation: share of ``|S - W|^2`` that rotating the pairs explains; the rest is the change of the pairs' lengths.
        kept: share of ``|S - W|^2`` that angles of the given rank explain.
    """

    name: str
    norm_change: float
    direction_change: float
    angle_rms: float
    change: float
    rotation: float
    kept: float


def pairs(W: Tensor) -> Tensor:
    """Return the pairs ``w_e + i w_o`` ``(out, fan_in // 2)``, complex128, of a weight ``(out, ...)``.

    An odd last column is left out.
    """
    matrix = W.flatten(1).double()
    even = matrix.shape[1] // 2 * 2
    return torch.complex(matrix[:, 0:even:2].contiguous(), matrix[:, 1:even:2].contiguous())


def angles_between(W: Tensor, S: Tensor) -> Tensor:
    """Return the rotation ``Theta`` that brings the pairs of ``W`` closest to ``S``.

    Its shape is ``(out, fan_in // 2)``, in float64, with angles in ``(-pi, pi]``.
    """
    return torch.angle(pairs(W).conj() * pairs(S))


def factors(theta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the float32 factors whose product is nearest to ``theta``: ``A`` ``(out, rank)`` and ``B`` ``(rank, fan_in //
    2)``.

    They are padded with zeros if ``rank`` exceeds the rank of ``theta``.
    """
    U, S, Vh = torch.linalg.svd(theta, full_matrices=False)
    kept_rank = min(rank, len(S))
    A, B = theta.new_zeros(theta.shape[0], rank), theta.new_zeros(rank, theta.shape[1])
    root = S[:kept_rank].sqrt()  # shared between the two, so that neither is out of scale
    A[:, :kept_rank], B[:kept_rank] = U[:, :kept_rank] * root, root[:, None] * Vh[:kept_rank]
    return A.float(), B.float()


def measure_change(name: str, W: Tensor, S: Tensor, A: Tensor, B: Tensor) -> LayerChange:
    """Return how much of the change from ``W`` to ``S`` is norm and how much is rotation.

    ``kept`` is the share of the change that the angles ``A B`` keep.
    """
    w, s = W.flatten(1).double(), S.flatten(1).double()
    norm_w, norm_s = w.norm(dim=1).clamp_min(1e-30), s.norm(dim=1).clamp_min(1e-30)
    cosine = (w * s).sum(1) / (norm_w * norm_s)
    theta, before, after = angles_between(W, S), pairs(W), pairs(S)
    total_change = (after - before).abs().square().sum()

    def remaining(angles: Tensor) -> float:
        rotated = before * torch.polar(torch.ones_like(angles), angles)
        return float((after - rotated).abs().square().sum() / total_change) if total_change else 0.0

    return LayerChange(
        name=name,
        norm_change=float(((norm_s - norm_w).abs() / norm_w).mean()),
        direction_change=float((1 - cosine).mean()),
        angle_rms=float(theta.square().mean().sqrt()),
        change=float((s - w).norm() / w.norm().clamp_min(1e-30)),
        rotation=1 - remaining(theta),
        kept=1 - remaining(A.double() @ B.double()),
    )
