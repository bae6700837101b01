"""Statistics of a study: mean and spread over training seeds, and differences between cells at the same seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from wadi.study.collect import RunRow


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over ``count`` training seeds; ``std`` is None for one seed."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Pair:
    """The difference ``other - cell`` of one value over the seeds that both have.

    Attributes:
        mean, std: of the differences; ``std`` is None for one seed.
        error: standard error of the mean, ``std / sqrt(count)``.
        lower, higher: number of seeds at which ``other`` is lower and higher.
    """

    cell: str
    other: str
    value: str
    mean: float
    std: float | None
    error: float | None
    count: int
    lower: int
    higher: int


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def summarize(rows: Sequence[RunRow]) -> dict[str, dict[str, Spread]]:
    """Return for each cell, in the order of the rows, the spread of each value that its finished runs have."""
    cells: dict[str, dict[str, Spread]] = {}
    for name in dict.fromkeys(row.cell for row in rows):
        done = [row.values for row in rows if row.cell == name and row.status == "done"]
        cells[name] = {
            value: spread([values[value] for values in done if value in values])
            for value in dict.fromkeys(value for values in done for value in values)
        }
    return cells


def pairs(rows: Sequence[RunRow]) -> list[Pair]:
    """Compare each cell with each later one, value by value, at the seeds with a finished run of both."""
    names = list(dict.fromkeys(row.cell for row in rows))
    done = {(row.cell, row.seed): row.values for row in rows if row.status == "done"}
    seeds = sorted({row.seed for row in rows})
    found = []
    for cell, other in itertools.combinations(names, 2):
        both = [(done[cell, seed], done[other, seed]) for seed in seeds if (cell, seed) in done and (other, seed) in done]
        for value in dict.fromkeys(name for one, _ in both for name in one):
            differences = [two[value] - one[value] for one, two in both if value in one and value in two]
            if differences:
                found.append(_pair(cell, other, value, differences))
    return found


def against(found: Sequence[Pair], baseline: str) -> list[Pair]:
    """Return the comparisons with ``baseline``, each as the difference of the other cell from it."""
    turned = [pair if pair.cell == baseline else _turned(pair) for pair in found if baseline in (pair.cell, pair.other)]
    return sorted(turned, key=lambda pair: [other.other for other in turned].index(pair.other))


def _pair(cell: str, other: str, value: str, differences: Sequence[float]) -> Pair:
    of = spread(differences)
    error = None if of.std is None else of.std / math.sqrt(of.count)
    lower, higher = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return Pair(cell, other, value, of.mean, of.std, error, of.count, lower, higher)


def _turned(pair: Pair) -> Pair:
    return Pair(
        pair.other, pair.cell, pair.value, -pair.mean, pair.std, pair.error, pair.count, pair.higher, pair.lower
    )  # fmt: skip
