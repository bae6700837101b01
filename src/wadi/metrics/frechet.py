"""Frechet distance of two sets of features, each taken for a Gaussian.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

On Inception features this is the FID; on any other features it is not, and is to be named after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wadi.errors import WadiError


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` (divisor ``N - 1``) of features ``(N, D)``, float64.

    Raises:
        WadiError: on fewer than two rows or a feature that is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise WadiError(f"Received features of shape {tuple(features.shape)}. Expected (N, D) with at least 2 images.")
    rows = features.double()
    if not rows.isfinite().all():
        bad = int((~rows.isfinite().all(1)).sum())
        raise WadiError(
            f"{bad} of {len(rows)} images have features that are not finite. Expected finite ones: check the images."
        )
    centred = rows - rows.mean(0)
    return rows.mean(0), centred.T @ centred / (len(rows) - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Squared Frechet distance of two `moments`, as the FID is reported.

    The root of the product is taken through symmetric eigendecompositions, so singular covariances (fewer images than
    features) need no added diagonal.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    root = _sqrt(cov_1)
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp_min(0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross)


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
