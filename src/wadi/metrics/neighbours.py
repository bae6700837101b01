"""Precision, recall, density and coverage by k-nearest neighbours of features.

``B(x)`` is the open ball around ``x`` that reaches to its k-th nearest neighbour in its own set:

    precision = share of fakes in some B(real)       recall   = share of reals in some B(fake)
    density   = mean number of B(real) around a fake, over k
    coverage  = share of B(real) that contain a fake

Kynkäänniemi et al., NeurIPS 2019, and Naeem et al., ICML 2020. Distances are computed in blocks: memory is ``block`` rows of
the table of distances, never the whole table.

Spread with the fakes: precision and density are means over the fakes. Without a given fake, coverage loses the balls that only
this fake is in (the jackknife). For recall the jackknife gives too much, because the balls of the neighbours grow: see
`recall_spread`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import pair

NAME = "k-nearest-neighbour metric"
BLOCK = 1024
DIVISIONS = 12  # into halves, for the spread of recall


@dataclass(frozen=True)
class Neighbours:
    """The four metrics, and the ``k`` they were computed with. All but density are in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


@dataclass(frozen=True)
class Membership:
    """The values that the four metrics are means of.

    ``precision`` and ``density`` have a value for each fake, ``recall`` and ``coverage`` for each real image.
    ``coverage_influence (m,)`` is ``(m - 1) (coverage - coverage without this fake)``, for `wadi.metrics.spread`.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor
    coverage_influence: Tensor


def prdc(real: Tensor, fake: Tensor, k: int = 3, block: int = BLOCK) -> Neighbours:
    """Return precision, recall, density and coverage of features ``real (n, d)`` and ``fake (m, d)``.

    Args:
        block: rows of distances in memory at a time; it does not change the result.
    Raises:
        WadiError: on fewer than ``k + 1`` images in a set, features that are not finite, or different dimensions.
    """
    members = membership(real, fake, k, block)
    precision, recall, density, coverage = (
        float(part.double().mean()) for part in (members.precision, members.recall, members.density, members.coverage)
    )
    return Neighbours(precision, recall, density, coverage, k)


def membership(real: Tensor, fake: Tensor, k: int = 3, block: int = BLOCK) -> Membership:
    """Return the values of each image that `prdc` averages. Arguments and errors are those of `prdc`."""
    if k < 1 or block < 1:
        raise WadiError(f"k is {k} and block is {block}. Both must be at least 1.")
    real, fake = pair(real, fake, k + 1, f"{NAME} with k = {k}")
    real_radius, fake_radius = radii(real, k, block), radii(fake, k, block)
    within = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # B(real) around each fake
    alone = torch.zeros_like(within)  # those that contain no other fake
    recalled, covered = [], []
    for start, distance in _blocks(real, fake, block):  # (block, m)
        inside = distance < real_radius[start : start + len(distance), None]
        within += inside.sum(0)
        covered.append(inside.any(1))
        alone += inside[inside.sum(1) == 1].sum(0)
        recalled.append((distance < fake_radius).any(1))
    influence = alone.double() * (len(fake) - 1) / len(real)
    return Membership(within > 0, torch.cat(recalled), within.double() / k, torch.cat(covered), influence)


def recall_spread(real: Tensor, fake: Tensor, k: int = 3, seed: int = 0, block: int = BLOCK) -> float | None:
    """Return the standard deviation of recall when the fakes are generated again.

    The fakes are divided into halves, `DIVISIONS` times. Two halves are independent sets, so the squared difference of their
    recalls gives the variance for ``m / 2`` fakes. For ``m`` fakes the variance is between half of that (many reals for each
    fake) and all of it (few reals, each reached or not by itself). We take the middle, ``2^-1/2`` of it, which is at most 19 %
    off either way. Similar prompts are not compared here, so the differences between prompts are included.

    Returns:
        None if there are fewer than ``2 (k + 1)`` fakes.
    Raises:
        WadiError: as `prdc`.
    """
    real, fake = pair(real, fake, k + 1, f"{NAME} with k = {k}")
    if len(fake) < 2 * (k + 1):
        return None
    sides = halves(len(fake), DIVISIONS, seed).to(fake.device)
    radius = torch.empty(sides.shape, dtype=fake.dtype, device=fake.device)
    for start, distance in _blocks(fake, fake, block):
        own = torch.arange(len(distance), device=distance.device)
        distance[own, start + own] = torch.inf
        for side, side_radius in zip(sides, radius, strict=True):
            other = side[start : start + len(distance), None] != side
            side_radius[start : start + len(distance)] = distance.masked_fill(other, torch.inf).kthvalue(k, dim=1).values
    recalled = torch.zeros(len(sides), 2, dtype=torch.int64, device=fake.device)
    for _, distance in _blocks(real, fake, block):
        for count, side, reach in zip(recalled, sides, radius, strict=True):
            reached = distance < reach
            count += torch.stack([(reached & part).any(1).sum() for part in (side, ~side)])
    difference = (recalled[:, 0] - recalled[:, 1]).double() / len(real)
    return float((difference.square().mean() / 2 / 2**0.5).sqrt())


def halves(count: int, divisions: int, seed: int = 0) -> Tensor:
    """Return random divisions of ``count`` images into halves: booleans ``(divisions, count)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator) % 2 == 0 for _ in range(divisions)])


def radii(features: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """Return the distance ``(n,)`` of each image to its k-th nearest other image."""
    distances = []
    for start, distance in _blocks(features, features, block):
        own = torch.arange(len(distance), device=distance.device)
        distance[own, start + own] = torch.inf
        distances.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(distances)


def _blocks(x: Tensor, y: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, distances (block, m))`` down the table of Euclidean distances."""
    y_square = y.square().sum(1)
    for start in range(0, len(x), block):
        part = x[start : start + block]
        sums = part.square().sum(1)[:, None] + y_square
        square = sums - 2 * (part @ y.T)
        # A value below rounding means a duplicate. Its distance must be 0 in any order of the sums.
        square[square < 64 * torch.finfo(square.dtype).eps * sums] = 0
        yield start, square.sqrt_()
