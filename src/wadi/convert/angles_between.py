"""The rotation that turns one weight into another: angles, low-rank factors, and the share of the change they explain.

Neighbouring columns of a row of ``W`` are a pair ``w = w_e + i w_o``. A rotation by ``theta`` makes it ``w e^{i theta}``. So
two weights determine the angle that brings each pair of one closest to the other:

    theta = arg(conj(w) s) = atan2(w_e s_o - w_o s_e, w_e s_e + w_o s_o)

A rotation cannot change the lengths of the pairs; that part of the change remains. For weights that LoRaD made, with angles
below half a turn, ``Theta`` ``(out, fan_in // 2)`` is ``A B`` itself: its truncated singular value decomposition gives the
factors, and only rounding is lost. For other students ``Theta`` has a high rank. The angles of pairs that are almost zero are
then large and mean nothing, and would dominate the decomposition. So `best_factors` minimises what counts, the squared distance
of the rotated pairs from the student's,

    sum |s - w e^{i phi}|^2 = sum (|s| - |w|)^2 + 2 |s| |w| (1 - cos(theta - phi)),    phi = A B

by L-BFGS, from a decomposition in which the angles of short pairs are shrunk by their squared length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXPLAINED = 1e-9  # share of the distance that counts as rounding
ITERATIONS = 40


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
        lora: share of it that a LoRA of the same rank would keep.
    """

    name: str
    norm_change: float
    direction_change: float
    angle_rms: float
    change: float
    rotation: float
    kept: float
    lora: float = 1.0


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


def best_factors(W: Tensor, S: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the float32 factors ``A`` and ``B`` of angles that bring ``W`` close to ``S``, never farther than ``W`` itself.

    They are those of `factors` if these explain all of the rotation; zero if no angles of this rank bring ``W`` closer.
    """
    theta, w, s = angles_between(W, S), pairs(W), pairs(S)
    weights = w.abs() * s.abs()
    mean = weights.mean()
    if not mean > 0:
        return factors(torch.zeros_like(theta), rank)
    weights = weights / mean

    def distance(A: Tensor, B: Tensor) -> float:
        """Return the mean of the second term above, in float64."""
        return float((weights * (1 - torch.cos(theta - A.double() @ B.double()))).mean())

    unturned = float((weights * (1 - torch.cos(theta))).mean())
    plain = factors(theta, rank)
    if distance(*plain) <= EXPLAINED * unturned:
        return plain
    length = w.abs().square().flatten()
    typical = length.kthvalue(max(1, round(0.9 * len(length)))).values.clamp_min(1e-300)
    shrunk = factors(theta * (w.abs().square() / typical).clamp_max(1), rank)
    start = min((plain, shrunk), key=lambda pair: distance(*pair))
    found = factors(torch.matmul(*_refined(theta, weights, *start)).double(), rank)
    best = min((plain, shrunk, found), key=lambda pair: distance(*pair))
    return best if distance(*best) < unturned else factors(torch.zeros_like(theta), rank)


def _refined(theta: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors after some steps of L-BFGS on the weighted distance of the angles, in float32."""
    theta, weights = theta.float(), weights.float()
    A, B = (factor.clone().requires_grad_() for factor in (A, B))
    optimizer = torch.optim.LBFGS([A, B], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (weights * (1 - torch.cos(theta - A @ B))).mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return A.detach(), B.detach()


def low_rank_share(W: Tensor, S: Tensor, rank: int) -> float:
    """Return the share of ``|S - W|^2`` that the best matrix of rank ``rank`` keeps, as a LoRA of this rank adds it."""
    change = (S.double() - W.double()).flatten(1)
    gram = change @ change.T if change.shape[0] <= change.shape[1] else change.T @ change
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    total = float(values.sum())
    return float(values[:rank].sum()) / total if total > 0 else 1.0


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
        lora=low_rank_share(W, S, len(B)),
    )
