"""Frechet distance of two sets of features, each taken for a Gaussian.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

On Inception features this is the FID; on any other features it is not, and is to be named after them.

The last trace is the sum of the singular values of ``F_1 F_2^T`` for any factors ``S = F^T F``: the centred features
themselves, or what an eigendecomposition leaves of a covariance above rounding. No root of a rounded zero is taken, so
singular covariances (fewer images than dimensions) need no added diagonal and cost no accuracy.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import rows

NAME = "Frechet distance"
Statistics = tuple[Tensor, Tensor]


class Moments:
    """Mean and covariance of features that arrive in parts, in float64, by pairwise updates (Chan et al., 1979).

    ``len()`` is the number of images; ``mean (d,)`` and ``cov (d, d)`` with divisor ``n - 1``. The result does not depend on
    the parts beyond rounding.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def __len__(self) -> int:
        return self.count

    def update(self, features: Tensor) -> Moments:
        """Take in features ``(n, d)``.

        Raises:
            WadiError: if they are not finite or of another dimension.
        """
        part = rows(features.cpu(), 1, NAME)
        if part.shape[1] != len(self.mean):
            raise WadiError(f"Received features of {part.shape[1]} dimensions. Expected {len(self.mean)}, as those before.")
        mean = part.mean(0)
        centred = part - mean
        return self._join(len(part), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Take in what another process has gathered."""
        return self._join(other.count, other.mean, other._scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> Moments:
        if count == 0:
            return self
        total = self.count + count
        gap = mean - self.mean
        self._scatter += scatter + torch.outer(gap, gap) * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total
        return self

    @property
    def cov(self) -> Tensor:
        """Covariance ``(d, d)``.

        Raises:
            WadiError: on fewer than two images.
        """
        if self.count < 2:
            raise WadiError(f"Received {self.count} images. The {NAME} needs at least 2: add images.")
        return self._scatter / (self.count - 1)


def moments(features: Tensor) -> Statistics:
    """Mean ``(d,)`` and covariance ``(d, d)`` (divisor ``n - 1``) of features ``(n, d)``, float64.

    Raises:
        WadiError: on fewer than two rows or a feature that is not finite.
    """
    found = rows(features, 2, NAME)
    centred = found - found.mean(0)
    return found.mean(0), centred.T @ centred / (len(found) - 1)


def frechet_distance(first: Tensor | Moments | Statistics, second: Tensor | Moments | Statistics) -> float:
    """Squared Frechet distance, as the FID is reported.

    Args:
        first, second: features ``(n, d)``, gathered `Moments`, or ``(mean, covariance)``, each as it comes.
    Raises:
        WadiError: on fewer than two images, features that are not finite, or different dimensions.
    """
    mean_1, factor_1 = _mean_and_factor(first)
    mean_2, factor_2 = _mean_and_factor(second)
    if len(mean_1) != len(mean_2):
        raise WadiError(f"Received features of {len(mean_1)} and of {len(mean_2)} dimensions. Expected both of one network.")
    cross = torch.linalg.svdvals(factor_1 @ factor_2.T).sum()
    square = (mean_1 - mean_2).square().sum() + factor_1.square().sum() + factor_2.square().sum() - 2 * cross
    return max(float(square), 0.0)  # rounding alone can take equal sets below zero


def _mean_and_factor(of: Tensor | Moments | Statistics) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and ``F (r, d)`` with ``F^T F`` the covariance and ``r`` at most ``min(n, d)``."""
    if isinstance(of, Tensor):
        found = rows(of, 2, NAME)
        factor = (found - found.mean(0)) / (len(found) - 1) ** 0.5
        tall = len(found) > found.shape[1]
        return found.mean(0), torch.linalg.qr(factor, mode="r").R if tall else factor  # R^T R = F^T F
    if isinstance(of, Moments):
        return _factored(of.mean, of.cov)
    return _factored(*of)


def _factored(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    mean, cov = mean.double(), cov.double()
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise WadiError(
            f"Received a mean of shape {tuple(mean.shape)} and a covariance of {tuple(cov.shape)}. Expected (d,) and (d, d)."
        )
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise WadiError("Received a mean or covariance that is not finite. Expected the statistics of finite features.")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    above = values > values.abs().max() * len(mean) * torch.finfo(torch.float64).eps
    return mean, values[above].sqrt()[:, None] * vectors[:, above].T


def read_statistics(path: Path) -> Statistics:
    """Mean and covariance from an ``.npz`` with ``mu`` and ``sigma``, the form in which reference statistics are published.

    Raises:
        WadiError: if the file is none, or lacks one of the two.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            return torch.from_numpy(held["mu"]).double(), torch.from_numpy(held["sigma"]).double()
    except (OSError, ValueError, KeyError) as error:
        raise WadiError(
            f"{str(path)!r} holds no reference statistics ({error}). Expected an .npz file with arrays 'mu' (d,) and "
            "'sigma' (d, d)."
        ) from error


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write what `read_statistics` reads, whole or not at all."""
    import io

    import numpy as np

    from wadi.files import write_whole

    stream = io.BytesIO()
    np.savez(stream, mu=statistics[0].numpy(), sigma=statistics[1].numpy())
    write_whole(path, stream.getvalue())
