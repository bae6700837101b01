"""Frechet distance of two sets of features, each taken for a Gaussian.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

On Inception features this is the FID; on any other features it is not, and is to be named after them.

The last trace is the sum of the singular values of ``F_1 F_2^T`` for any factors ``S = F^T F``: the centred features
themselves, or what an eigendecomposition leaves of a covariance above rounding. No root of a rounded zero is taken, so
singular covariances (fewer images than dimensions) need no added diagonal and cost no accuracy.

How much the distance varies with the images of the first set follows from its derivative by the weight ``w_i`` of each image.
With ``c_i`` the centred features of image ``i`` and ``U S V^T`` the singular value decomposition of ``F_1 F_2^T``:

    phi_i = 2 c_i . (mu_1 - mu_2) + n / (n - 1) |c_i|^2 - n (U S U^T)_ii
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.regular import open_regular
from wadi.metrics.checks import rows
from wadi.metrics.spread import of_influence

NAME = "Frechet distance"
SAMPLE = 8192  # images whose halves tell what pairs of images add to the spread
Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gaussian:
    """A set of features that is ready to be compared: ``mean (d,)`` and ``factor F (r, d)`` with ``F^T F`` the covariance."""

    mean: Tensor
    factor: Tensor


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


Features = Tensor | Moments | Statistics | Gaussian


def frechet_distance(first: Features, second: Features) -> float:
    """Squared Frechet distance, as the FID is reported.

    Args:
        first, second: features ``(n, d)``, gathered `Moments`, ``(mean, covariance)``, or a `Gaussian`, each as it comes.
    Raises:
        WadiError: on fewer than two images, features that are not finite, or different dimensions.
    """
    one, two = gaussian(first), gaussian(second)
    _same_dimension(one.mean, two.mean)
    cross = torch.linalg.svdvals(one.factor @ two.factor.T).sum()
    square = (one.mean - two.mean).square().sum() + one.factor.square().sum() + two.factor.square().sum() - 2 * cross
    return max(float(square), 0.0)  # rounding alone can take equal sets below zero


def gaussian(of: Features) -> Gaussian:
    """Mean and factor of the covariance, computed once for a reference that many sets are compared with.

    Raises:
        WadiError: on fewer than two images, or features that are not finite.
    """
    if isinstance(of, Gaussian):
        return of
    if isinstance(of, Tensor):
        found = rows(of, 2, NAME)
        factor = (found - found.mean(0)) / (len(found) - 1) ** 0.5
        tall = len(found) > found.shape[1]
        return Gaussian(found.mean(0), torch.linalg.qr(factor, mode="r").R if tall else factor)  # R^T R = F^T F
    return Gaussian(*(_factored(of.mean, of.cov) if isinstance(of, Moments) else _factored(*of)))


def influence(first: Tensor, second: Features) -> Tensor:
    """``phi (n,)``, the influence of each image of ``first (n, d)`` on the distance to ``second`` (see the module).

    Raises:
        WadiError: as `frechet_distance`.
    """
    found, reference = rows(first, 2, NAME), gaussian(second)
    _same_dimension(found[0], reference.mean)
    count, mean = len(found), found.mean(0)
    centred = found - mean
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


def spread(first: Tensor, second: Features, nearest: Tensor | None = None, seed: int = 0) -> float:
    """Standard deviation of the distance when the images of ``first`` are generated again and ``second`` stays.

    The squared influences contain what pairs of images contribute twice, where the variance has it once. That part falls with
    ``1 / n^2`` and the other with ``1 / n``, so the influences of two halves of (at most `SAMPLE`) images tell it apart.

    Args:
        nearest: of `wadi.metrics.spread.nearest_prompts`.
        seed: of the division into halves.
    Raises:
        WadiError: as `frechet_distance`.
    """
    reference = gaussian(second)
    found = influence(first, reference)
    whole = of_influence(found, nearest)
    if len(first) < 4 or whole == 0:
        return whole
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:SAMPLE].to(first.device)
    halves = sum(of_influence(influence(first[part], reference)) ** 2 for part in order.chunk(2)) / 2
    all_of_them = of_influence(found) ** 2
    sample = of_influence(influence(first[order], reference)) ** 2 if len(first) > SAMPLE else all_of_them
    pairs = (halves / 4 - sample / 2) * (len(order) / len(first)) ** 2 / all_of_them
    return whole * (1 - min(max(pairs, 0.0), 0.5)) ** 0.5


def _same_dimension(one: Tensor, two: Tensor) -> None:
    if len(one) != len(two):
        raise WadiError(f"Received features of {len(one)} and of {len(two)} dimensions. Expected both of one network.")


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
        WadiError: if it is no such file, or the two do not fit or are not finite.
    """
    import zipfile

    import numpy as np

    try:
        with open_regular(path, what="Statistics") as stream, np.load(stream, allow_pickle=False) as held:
            mean, cov = (torch.from_numpy(np.asarray(held[name], dtype=np.float64)) for name in ("mu", "sigma"))
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"shapes {tuple(mean.shape)} and {tuple(cov.shape)}")
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError("values that are not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        if isinstance(error, WadiError):
            raise
        raise WadiError(
            f"{str(path)!r} does not contain reference statistics ({error}). It must be an .npz file with the arrays 'mu' (d,) "
            "and 'sigma' (d, d)."
        ) from error
    return mean, cov


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write what `read_statistics` reads, whole or not at all."""
    import io

    import numpy as np

    from wadi.io.files import write_whole

    stream = io.BytesIO()
    np.savez(stream, mu=statistics[0].numpy(), sigma=statistics[1].numpy())
    write_whole(path, stream.getvalue())
