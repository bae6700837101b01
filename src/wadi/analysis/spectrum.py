"""How much of a matrix is in its largest singular values.

The cumulative energy at rank ``k`` is ``sum_{i <= k} sigma_i^2 / sum_i sigma_i^2``. Squared singular values of ``E`` are the
eigenvalues of its Gram matrix on the shorter side. `exact` computes only these, and no singular vectors.

`sketched` uses a random subspace instead (Halko, Martinsson and Tropp 2011, algorithm 4.4): ``Q`` orthonormal with ``l``
columns, from ``E`` times a Gaussian matrix and a power iteration. Its energies are those of ``Q^T E``. They are never above
the true ones, and as ``E^T E = (Q^T E)^T (Q^T E) + E^T (I - Q Q^T) E``, Ky Fan's inequality bounds the missing energy at any
rank:

    sketched_k <= true_k <= sketched_k + min(outside, |E|^2 - sketched_k),   outside = |E|^2 - |Q^T E|^2.

The bound is computed for every matrix. It is small where the residual has low rank, and large for a flat spectrum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLE = 16  # columns of the sketch beyond the rank
SHARE = 0.3  # of full rank: where the paper reads the energy
FRACTIONS = tuple(i / 50 for i in range(1, 51))  # of full rank, where the curve is kept
EXACT_UP_TO = 4096  # shorter side up to which the exact spectrum is computed


class Spectrum(NamedTuple):
    """Squared singular values.

    Attributes:
        energies: ``(k,)`` float64, descending; all of them if exact.
        total: ``|E|^2``.
        missing: upper bound of the energy that is missing in the sum of the first ``k`` energies, for any ``k``; 0 if exact.
    """

    energies: Tensor
    total: float
    missing: float


def full_rank(shape: tuple[int, ...]) -> int:
    """Return ``min(out, fan_in)``."""
    rows, columns = shape
    return min(rows, columns)


def rank_at(share: float, full: int) -> int:
    """Return the rank that is ``share`` of ``full``, rounded down, but at least 1."""
    return max(1, int(share * full + 1e-9))


@torch.no_grad()
def exact(E: Tensor) -> Spectrum:
    """Return all squared singular values of ``E`` ``(out, fan_in)``."""
    gram = _gram(E)
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu()
    return Spectrum(energies, float(gram.trace()), 0.0)


def _gram(E: Tensor) -> Tensor:
    """Return the Gram matrix of ``E`` on its shorter side, in float64."""
    E = E if E.shape[0] <= E.shape[1] else E.T
    gram = torch.zeros(len(E), len(E), dtype=torch.float64, device=E.device)
    for part in E.split(max(1, (1 << 22) // len(E)), 1):  # a whole copy in float64 would take too much memory
        part = part.double()
        gram.addmm_(part, part.T)
    return gram


@torch.no_grad()
def sketched(E: Tensor, rank: int, seed: int = 0) -> Spectrum:
    """Return the largest ``rank`` squared singular values of ``E`` ``(out, fan_in)`` float32, from a random subspace."""
    width = min(rank + OVERSAMPLE, full_rank(tuple(E.shape)))
    noise = torch.randn(E.shape[1], width, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(E @ noise.to(E)).Q
    Q = torch.linalg.qr(E @ torch.linalg.qr(E.T @ Q).Q).Q  # one power iteration, kept orthonormal
    inside = _gram(Q.T @ E)
    total = float(sum(part.double().square().sum() for part in E.split(256)))
    energies = torch.linalg.eigvalsh(inside).flip(0).clamp_min(0).cpu()[:rank]
    return Spectrum(energies, total, max(0.0, total - float(inside.trace())))


def spectrum(E: Tensor, exact_up_to: int = EXACT_UP_TO) -> tuple[Spectrum, bool]:
    """Return ``(spectrum, whether it is exact)``: `sketched` up to `SHARE` of full rank if that exceeds ``exact_up_to``."""
    full = full_rank(tuple(E.shape))
    if full <= exact_up_to:
        return exact(E), True
    return sketched(E, rank_at(SHARE, full)), False


def curve(spectrum: Spectrum, full: int) -> list[float | None]:
    """Return the cumulative energy, as a share of the total, at `FRACTIONS` of the full rank; None beyond the known ranks."""
    sums = spectrum.energies.cumsum(0) / spectrum.total
    ranks = [rank_at(share, full) for share in FRACTIONS]
    return [min(1.0, float(sums[rank - 1])) if rank <= len(sums) else None for rank in ranks]


def energy_at(spectrum: Spectrum, full: int, share: float = SHARE) -> tuple[float, float]:
    """Return the cumulative energy at a share of full rank, and by how much the truth may be larger, as shares of the total."""
    value = min(1.0, float(spectrum.energies[: rank_at(share, full)].sum()) / spectrum.total)
    return value, min(spectrum.missing / spectrum.total, 1.0 - value)
