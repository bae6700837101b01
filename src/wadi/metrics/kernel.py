"""Kernel distance: squared maximum mean discrepancy under the cubic kernel, unbiased (the KID on Inception features).

    k(x, y) = (x . y / d + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Bińkowski et al., "Demystifying MMD GANs", ICLR 2018: the mean over random subsets. Published kernel distances come with the
standard deviation over the subsets. It says how far one subset lies from another and not how far the mean would move if the
images were generated again; that is `Estimate.spread`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import pair
from wadi.metrics.spread import of_influence

NAME = "kernel distance"


@dataclass(frozen=True)
class Estimate:
    """A mean over subsets.

    Attributes:
        std: standard deviation over the subsets (divisor: their number), as published KIDs have it.
        spread: standard deviation of ``value`` when the images of the first set are generated again.
    """

    value: float
    std: float
    spread: float


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0, nearest: Tensor | None = None
) -> Estimate:
    """Mean and spread of `mmd2` over subsets drawn without replacement; it may be below zero, being unbiased.

    Args:
        first, second: features ``(n, d)`` and ``(m, d)``.
        seed: of numpy's ``RandomState``, drawn from for ``first`` then ``second`` in each subset, as torch-fidelity does (whose
            own seed is 2020), so that equal seeds give equal numbers.
        nearest: of `wadi.metrics.spread.nearest_prompts`, for the spread.
    Raises:
        WadiError: if a set is smaller than ``subset_size``, or features are not finite or of different dimensions.
    """
    import numpy as np

    if subsets < 1 or subset_size < 2:
        raise WadiError(f"Received {subsets} subsets of {subset_size}. Expected at least 1 of at least 2 images.")
    x, y = pair(first, second, subset_size, f"{NAME} in subsets of {subset_size}")
    random = np.random.RandomState(seed)
    values, pairs = [], []
    influence, times = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for _ in range(subsets):
        one, two = (torch.from_numpy(random.choice(len(of), subset_size, replace=False)).to(of.device) for of in (x, y))
        k_xx, k_yy, k_xy = _kernels(x[one], y[two])
        values.append(_mmd2(k_xx, k_yy, k_xy))
        own = (k_xx.sum(1) - k_xx.diagonal()) / (subset_size - 1)
        influence[one] += 2 * (own - k_xy.mean(1)) / (subsets * subset_size)
        times[one] += 1
        pairs.append(_pair_variance(k_xx))
    found = torch.tensor(values, dtype=torch.float64)
    share = times / (subsets * subset_size)
    centred = (influence - share * influence.sum()) * len(x)
    return Estimate(
        float(found.mean()),
        float(found.std(correction=0)),
        of_influence(centred, nearest) * _without_pairs(centred, sum(pairs) / subsets, subsets, subset_size),
    )


def _pair_variance(k_xx: Tensor) -> float:
    """Mean square of what a pair of images adds to the kernel beyond the parts of each of them (Hoeffding's second term)."""
    m = len(k_xx)
    if m < 4:
        return 0.0
    off = k_xx - torch.diag(k_xx.diagonal())
    row = off.sum(1) / (m - 2)
    mean = off.sum() / ((m - 1) * (m - 2))
    rest = off - row[:, None] - row[None] + mean
    return float((rest.square().sum() - rest.diagonal().square().sum()) / (m * (m - 3)))


def _without_pairs(centred: Tensor, pair_variance: float, subsets: int, size: int) -> float:
    """Factor of the spread: squared influences hold the part of pairs of images twice, the variance of the mean once."""
    n = len(centred)
    share = size * (size - 1) / (n * (n - 1))  # of the subsets that hold a given pair, on average
    squares = subsets * share * (1 - share) + (subsets * share) ** 2  # mean square of how many do
    twice = pair_variance * n * (n - 1) / 2 * (2 / (subsets * size * (size - 1))) ** 2 * squares
    whole = of_influence(centred) ** 2
    return (1 - min(max(twice / whole if whole else 0.0, 0.0), 0.5)) ** 0.5


def mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate above from ``x (n, d)`` and ``y (m, d)``."""
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
