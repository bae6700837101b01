"""Figures of a study: quality against parameters, time and steps; direction against norm change; diversity against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wadi.io.figures import canvas, look, save_figure, styled
from wadi.study.collect import label
from wadi.study.summary import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = Mapping[str, Mapping[str, Spread]]
COSTS = ("parameters", "minutes", "steps")
PERCENT = ("direction_change", "norm_change", "norm_chance", "share")


def draw_all(cells: Cells, metrics: Sequence[str], folder: Path) -> list[Path]:
    """Save every figure for which the study has values. Return the paths of the PNG files.

    Raises:
        WadiError: if they cannot be written.
    """
    paths = []
    for metric in metrics:
        shown = [(cost, metric) for cost in COSTS if any(cost in c and metric in c for c in cells.values())]
        if shown:
            paths += scatter(cells, shown, folder, f"quality-{metric.replace(' ', '-')}")
    if any({"direction_change", "norm_change"} <= values.keys() for values in cells.values()):
        shown = [("norm_change", other) for other in ("direction_change", "angle", "norm_chance")]
        paths += scatter(cells, shown, folder, "direction-change")
    for diversity in (name for name in metrics if name.startswith("diversity")):
        others = [(name, diversity) for name in metrics if name != diversity]
        if others:
            paths += scatter(cells, others[:3], folder, f"{diversity.replace(' ', '-')}-and-quality")
    return [path for path in paths if path.suffix == ".png"]


@styled
def scatter(cells: Cells, panels: Sequence[tuple[str, str]], folder: Path, name: str) -> list[Path]:
    """Save one panel for each pair ``(x, y)`` of values: a point for each cell, with bars of one standard deviation."""
    figure, axes = canvas(len(panels), width=max(4.2, 3.0 * len(panels)), height=3.0 + 0.16 * len(cells))
    data = []
    for panel, (x, y) in zip(axes, panels, strict=True):
        for index, (cell, values) in enumerate(cells.items()):
            if x in values and y in values:
                _point(panel, index, cell, (x, values[x]), (y, values[y]))
                for kind in (x, y):
                    of = values[kind]
                    data.append({"cell": cell, "value": kind, "mean": of.mean, "std": of.std, "seeds": of.count})
        panel.set(xlabel=_axis(x), ylabel=_axis(y))
        panel.margins(0.15)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, min(3, 100 // (4 + max(map(len, labels), default=1))))
    )
    rows = list({(row["cell"], row["value"]): row for row in data}.values())
    return save_figure(figure, folder, name, rows)


def _point(panel: Axes, index: int, cell: str, x: tuple[str, Spread], y: tuple[str, Spread]) -> None:
    style, (x_scale, y_scale) = look(index), (100 if kind in PERCENT else 1 for kind in (x[0], y[0]))
    panel.errorbar(
        x[1].mean * x_scale, y[1].mean * y_scale, xerr=(x[1].std or 0) * x_scale, yerr=(y[1].std or 0) * y_scale,
        color=style.colour, marker=style.marker, linestyle="none", capsize=2, label=cell,
    )  # fmt: skip


def _axis(name: str) -> str:
    return f"{label(name)} (%)" if name in PERCENT else label(name)
