"""Kernel distance: squared maximum mean discrepancy under the cubic kernel, unbiased (the KID on Inception features).

    k(x, y) = (x . y / d + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Bińkowski et al., "Demystifying MMD GANs", ICLR 2018: the mean over random subsets, whose spread is reported with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import pair

NAME = "kernel distance"


@dataclass(frozen=True)
class Estimate:
    """A mean over repetitions and their standard deviation (divisor ``n``, as published KIDs have it)."""

    value: float
    std: float


def kernel_distance(first: Tensor, second: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Estimate:
    """Mean and spread of `mmd2` over subsets drawn without replacement; it may be below zero, being unbiased.

    Args:
        first, second: features ``(n, d)`` and ``(m, d)``.
        seed: of numpy's ``RandomState``, drawn from for ``first`` then ``second`` in each subset, as torch-fidelity does (whose
            own seed is 2020), so that equal seeds give equal numbers.
    Raises:
        WadiError: if a set is smaller than ``subset_size``, or features are not finite or of different dimensions.
    """
    import numpy as np

    if subsets < 1 or subset_size < 2:
        raise WadiError(f"Received {subsets} subsets of {subset_size}. Expected at least 1 of at least 2 images.")
    x, y = pair(first, second, subset_size, f"{NAME} in subsets of {subset_size}")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        one, two = (torch.from_numpy(random.choice(len(of), subset_size, replace=False)).to(of.device) for of in (x, y))
        values.append(mmd2(x[one], y[two]))
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std(correction=0)))


def mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate above from ``x (n, d)`` and ``y (m, d)``."""
    d = x.shape[1]
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return float(_off_diagonal_mean(k_xx) + _off_diagonal_mean(k_yy) - 2 * k_xy.mean())


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))
