"""Statistics of a study: mean and spread over training seeds, and differences from one cell at the same seeds."""

from __future__ import annotations

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
    """The difference of one value between a cell and the baseline, over the seeds that both have.

    Attributes:
        mean, std: of the differences; ``std`` is None for one seed.
        error: standard error of the mean, ``std / sqrt(count)``.
        lower, higher: number of seeds at which the cell is lower and higher than the baseline.
    """

    cell: str
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


def pairs(rows: Sequence[RunRow], baseline: str) -> list[Pair]:
    """Compare each other cell with ``baseline``, value by value, at the seeds with a finished run of both."""
    done = {(row.cell, row.seed): row.values for row in rows if row.status == "done"}
    seeds = sorted({row.seed for row in rows})
    found = []
    for cell in dict.fromkeys(row.cell for row in rows if row.cell != baseline):
        both = [(done[baseline, seed], done[cell, seed]) for seed in seeds if {(baseline, seed), (cell, seed)} <= done.keys()]
        for value in dict.fromkeys(name for one, _ in both for name in one):
            differences = [other[value] - one[value] for one, other in both if value in one and value in other]
            if differences:
                found.append(_pair(cell, value, differences))
    return found


def _pair(cell: str, value: str, differences: Sequence[float]) -> Pair:
    of = spread(differences)
    error = None if of.std is None else of.std / math.sqrt(of.count)
    lower, higher = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return Pair(cell, value, of.mean, of.std, error, of.count, lower, higher)
