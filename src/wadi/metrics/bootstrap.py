"""Spread of any number about images: it is taken again and again on images drawn anew from those at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError


@dataclass(frozen=True)
class Interval:
    """A number with its spread.

    ``low`` and ``high`` are the quantiles of the resampled numbers, moved by their ``bias`` (their mean less ``value``):
    drawing with replacement repeats images, which alone moves a Frechet distance up and a recall down.
    """

    value: float
    low: float
    high: float
    std: float
    bias: float
    rounds: int
    level: float


def interval(
    fn: Callable[..., Any],
    *arrays: Tensor,
    rounds: int = 200,
    seed: int = 0,
    level: float = 0.95,
    paired: bool = False,
) -> Interval:
    """Bootstrap interval of ``fn(*arrays)``, a number, over the rows of the arrays.

    Args:
        fn: gets the arrays with as many rows as they came with.
        paired: draw the same rows of all arrays (an image and its prompt); otherwise each array is a sample of its own.
    Raises:
        WadiError: if there are too few rows or rounds, or paired arrays differ in length.
    """
    sizes = [len(array) for array in arrays]
    if not sizes or min(sizes) < 2:
        raise WadiError(f"Received arrays of {sizes} rows. The bootstrap needs at least one array, and 2 images in each.")
    if rounds < 2 or not 0 < level < 1:
        raise WadiError(f"rounds is {rounds} and level is {level}. Expected at least 2, and a share between 0 and 1.")
    if paired and len(set(sizes)) > 1:
        raise WadiError(f"Received arrays of {sizes} rows. Expected as many in each, for they are paired.")
    generator = torch.Generator().manual_seed(seed)
    value = float(fn(*arrays))
    found = torch.empty(rounds, dtype=torch.float64)
    for i in range(rounds):
        chosen = [torch.randint(size, (size,), generator=generator) for size in (sizes[:1] if paired else sizes)]
        index = chosen * len(arrays) if paired else chosen
        found[i] = float(fn(*(array[rows.to(array.device)] for array, rows in zip(arrays, index, strict=True))))
    tail = (1 - level) / 2
    bias = float(found.mean()) - value
    low, high = (float(found.quantile(q)) - bias for q in (tail, 1 - tail))
    return Interval(value, low, high, float(found.std()), bias, rounds, level)
