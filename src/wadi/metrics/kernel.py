"""Kernel distance: the squared maximum mean discrepancy under a cubic kernel, unbiased. On Inception features it is the KID.

    k(x, y) = (x . y / d + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, take the mean over random subsets. Published kernel distances come with
the standard deviation over the subsets. That is the scatter of a single subset, not how much the mean would change if the
images were generated again. The latter is `Estimate.spread`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import pair
from wadi.metrics.spread import spread_from_influence

NAME = "kernel distance"


@dataclass(frozen=True)
class Estimate:
    """A mean over subsets.

    Attributes:
        std: standard deviation over the subsets (divisor: their number), as published KIDs print it.
        spread: standard deviation of ``value`` when the images of the first set are generated again.
    """

    value: float
    std: float
    spread: float


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0, nearest: Tensor | None = None
) -> Estimate:
    """Return the mean and spread of `mmd2` over subsets drawn without replacement. It is unbiased, so it can be below zero.

    Args:
        first, second: features ``(n, d)`` and ``(m, d)``.
        seed: of numpy's ``RandomState``. Each subset draws for ``first``, then for ``second``, as torch-fidelity does, so
            equal seeds give equal values. (Its own default seed is 2020.)
        nearest: from `wadi.metrics.spread.nearest_prompts`, for the spread.
    Raises:
        WadiError: if a set is smaller than ``subset_size``, or features are not finite or have different dimensions.
    """
    import numpy as np

    if subsets < 1 or subset_size < 2:
        raise WadiError(f"There are {subsets} subsets of {subset_size} images. Use at least 1 subset of at least 2 images.")
    x, y = pair(first, second, subset_size, f"{NAME} in subsets of {subset_size}")
    random = np.random.RandomState(seed)
    values, pairs = [], []
    influence, times = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for _ in range(subsets):
        one, two = (torch.from_numpy(random.choice(len(part), subset_size, replace=False)).to(part.device) for part in (x, y))
        k_xx, k_yy, k_xy = _kernels(x[one], y[two])
        values.append(_mmd2(k_xx, k_yy, k_xy))
        own = (k_xx.sum(1) - k_xx.diagonal()) / (subset_size - 1)
        influence[one] += 2 * (own - k_xy.mean(1)) / (subsets * subset_size)
        times[one] += 1
        pairs.append(_pair_variance(k_xx))
    estimates = torch.tensor(values, dtype=torch.float64)
    share = times / (subsets * subset_size)
    centred = (influence - share * influence.sum()) * len(x)
    return Estimate(
        float(estimates.mean()),
        float(estimates.std(correction=0)),
        spread_from_influence(centred, nearest) * _without_pairs(centred, sum(pairs) / subsets, subsets, subset_size),
    )


def _pair_variance(k_xx: Tensor) -> float:
    """Return the mean square of the part of the kernel that belongs to pairs of images (Hoeffding's second term)."""
    m = len(k_xx)
    if m < 4:
        return 0.0
    off = k_xx - torch.diag(k_xx.diagonal())
    row = off.sum(1) / (m - 2)
    mean = off.sum() / ((m - 1) * (m - 2))
    rest = off - row[:, None] - row[None] + mean
    return float((rest.square().sum() - rest.diagonal().square().sum()) / (m * (m - 3)))


def _without_pairs(centred: Tensor, pair_variance: float, subsets: int, size: int) -> float:
    """Return the factor that corrects the spread: squared influences count the part of pairs twice, the variance once."""
    n = len(centred)
    share = size * (size - 1) / (n * (n - 1))  # of the subsets that contain a given pair, on average
    squares = subsets * share * (1 - share) + (subsets * share) ** 2  # mean square of the number of those
    twice = pair_variance * n * (n - 1) / 2 * (2 / (subsets * size * (size - 1))) ** 2 * squares
    whole = spread_from_influence(centred) ** 2
    return (1 - min(max(twice / whole if whole else 0.0, 0.0), 0.5)) ** 0.5


def mmd2(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate above from ``x (n, d)`` and ``y (m, d)``."""
    return _mmd2(*_kernels(x, y))


def _kernels(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[1]
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return k_xx, k_yy, k_xy


def _mmd2(k_xx: Tensor, k_yy: Tensor, k_xy: Tensor) -> float:
    return float(_off_diagonal_mean(k_xx) + _off_diagonal_mean(k_yy) - 2 * k_xy.mean())


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))
