"""Frechet distance between two sets of features, each modelled as a Gaussian.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

On Inception features this is the FID. On other features it is named after their network.

The last trace is the sum of the singular values of ``F_1 F_2^T`` for any factors ``S = F^T F``: the centred features
themselves, or the part of a covariance's eigendecomposition that is above rounding. We never take the root of a rounded zero,
so singular covariances (fewer images than dimensions) need no added diagonal and lose no accuracy.

The spread follows from the derivative of the distance by the weight ``w_i`` of each image of the first set. With ``c_i`` the
centred features of image ``i`` and ``U S V^T`` the singular value decomposition of ``F_1 F_2^T``:

    phi_i = 2 c_i . (mu_1 - mu_2) + n / (n - 1) |c_i|^2 - n (U S U^T)_ii
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import rows
from wadi.metrics.spread import spread_from_influence

NAME = "Frechet distance"
SAMPLE = 8192  # images whose halves show how much pairs of images add to the spread
Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gaussian:
    """A set of features, ready to be compared: ``mean (d,)``, and ``factor F (r, d)`` with ``F^T F`` the covariance."""

    mean: Tensor
    factor: Tensor


class Moments:
    """Mean and covariance of features that arrive in parts, in float64, by pairwise updates (Chan et al., 1979).

    ``len()`` is the number of images. ``mean`` has the shape ``(d,)``, ``cov`` ``(d, d)`` with the divisor ``n - 1``. The
    result depends on the division into parts only by rounding.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def __len__(self) -> int:
        return self.count

    def update(self, features: Tensor) -> Moments:
        """Add features ``(n, d)``.

        Raises:
            WadiError: if they are not finite or have another dimension.
        """
        part = rows(features.cpu(), 1, NAME)
        if part.shape[1] != len(self.mean):
            raise WadiError(f"Features of {part.shape[1]} dimensions follow features of {len(self.mean)}. Use one network.")
        mean = part.mean(0)
        centred = part - mean
        return self._join(len(part), mean, centred.T @ centred)

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
        """The covariance ``(d, d)``.

        Raises:
            WadiError: on fewer than two images.
        """
        if self.count < 2:
            raise WadiError(f"There are {self.count} images, and the {NAME} needs at least 2. Add images.")
        return self._scatter / (self.count - 1)


def moments(features: Tensor) -> Statistics:
    """Return the mean ``(d,)`` and covariance ``(d, d)`` (divisor ``n - 1``) of features ``(n, d)``, in float64.

    Raises:
        WadiError: on fewer than two rows, or a feature that is not finite.
    """
    values = rows(features, 2, NAME)
    centred = values - values.mean(0)
    return values.mean(0), centred.T @ centred / (len(values) - 1)


Features = Tensor | Moments | Statistics | Gaussian


def frechet_distance(first: Features, second: Features) -> float:
    """Return the squared Frechet distance, as the FID is reported.

    Args:
        first, second: features ``(n, d)``, `Moments`, ``(mean, covariance)``, or a `Gaussian`.
    Raises:
        WadiError: on fewer than two images, features that are not finite, or different dimensions.
    """
    one, two = gaussian(first), gaussian(second)
    _same_dimension(one.mean, two.mean)
    cross = torch.linalg.svdvals(one.factor @ two.factor.T).sum()
    square = (one.mean - two.mean).square().sum() + one.factor.square().sum() + two.factor.square().sum() - 2 * cross
    return max(float(square), 0.0)  # rounding alone can take equal sets below zero


def gaussian(features: Features) -> Gaussian:
    """Return the mean and a factor of the covariance. Compute it once for a reference that many sets are compared with.

    Raises:
        WadiError: on fewer than two images, or features that are not finite.
    """
    if isinstance(features, Gaussian):
        return features
    if isinstance(features, Tensor):
        values = rows(features, 2, NAME)
        factor = (values - values.mean(0)) / (len(values) - 1) ** 0.5
        tall = len(values) > values.shape[1]
        return Gaussian(values.mean(0), torch.linalg.qr(factor, mode="r").R if tall else factor)  # R^T R = F^T F
    return Gaussian(*(_factored(features.mean, features.cov) if isinstance(features, Moments) else _factored(*features)))


def influence(first: Tensor, second: Features) -> Tensor:
    """Return ``phi (n,)``, the influence of each image of ``first (n, d)`` on the distance to ``second`` (see the module).

    Raises:
        WadiError: as `frechet_distance`.
    """
    values, reference = rows(first, 2, NAME), gaussian(second)
    _same_dimension(values[0], reference.mean)
    count, mean = len(values), values.mean(0)
    centred = values - mean
    cross = centred @ reference.factor.T / (count - 1) ** 0.5  # F_1 F_2^T
    if cross.shape[1] < count:
        squares, vectors = torch.linalg.eigh(cross.T @ cross)
        above = squares > squares.max().clamp_min(0) * len(squares) * torch.finfo(torch.float64).eps
        diagonal = ((cross @ vectors[:, above]).square() / squares[above].sqrt()).sum(1)
    else:
        squares, vectors = torch.linalg.eigh(cross @ cross.T)
        diagonal = (vectors.square() * squares.clamp_min(0).sqrt()).sum(1)
    own = centred.square().sum(1) * (count / (count - 1))
    return 2 * centred @ (mean - reference.mean) + own - count * diagonal


def frechet_spread(first: Tensor, second: Features, nearest: Tensor | None = None, seed: int = 0) -> float:
    """Return the standard deviation of the distance when the images of ``first`` are generated again and ``second`` stays.

    The squared influences count the contribution of pairs of images twice; the variance has it once. That part falls with ``1
    / n^2`` and the rest with ``1 / n``, so the influences of two halves of (at most `SAMPLE`) images separate the two.

    Args:
        nearest: from `wadi.metrics.spread.nearest_prompts`.
        seed: of the division into halves.
    Raises:
        WadiError: as `frechet_distance`.
    """
    reference = gaussian(second)
    influences = influence(first, reference)
    whole = spread_from_influence(influences, nearest)
    if len(first) < 4 or whole == 0:
        return whole
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:SAMPLE].to(first.device)
    halves = sum(spread_from_influence(influence(first[part], reference)) ** 2 for part in order.chunk(2)) / 2
    all_of_them = spread_from_influence(influences) ** 2
    sample = spread_from_influence(influence(first[order], reference)) ** 2 if len(first) > SAMPLE else all_of_them
    pairs = (halves / 4 - sample / 2) * (len(order) / len(first)) ** 2 / all_of_them
    return whole * (1 - min(max(pairs, 0.0), 0.5)) ** 0.5


def _same_dimension(one: Tensor, two: Tensor) -> None:
    if len(one) != len(two):
        raise WadiError(f"The two sets of features have {len(one)} and {len(two)} dimensions. Use one network for both.")


def _factored(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and a factor of the covariance, without the eigenvalues that are rounding."""
    mean, cov = mean.double(), cov.double()
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise WadiError(
            f"The mean has shape {tuple(mean.shape)} and the covariance {tuple(cov.shape)}. They must have (d,) and (d, d)."
        )
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise WadiError("The mean or the covariance contains NaN or infinity. Compute them from finite features.")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    above = values > values.abs().max() * len(mean) * torch.finfo(torch.float64).eps
    return mean, values[above].sqrt()[:, None] * vectors[:, above].T
