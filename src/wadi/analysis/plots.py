"""The figures of an analysis, each saved with the data that it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from wadi.analysis.analyze import Analysis, groups_table
from wadi.analysis.angles import EDGES
from wadi.analysis.spectrum import FRACTIONS, SHARE
from wadi.io.figures import FAINT, INK, canvas, look, plain_labels, save_figure, styled

Row = dict[str, Any]
FLOOR = 1e-4  # percent; rounding in float32 changes a norm by less
CHANGES = (("norm", "norm change"), ("direction", "direction change"))


def draw_all(analysis: Analysis, folder: Path) -> list[Path]:
    """Save every figure that the analysis has data for, as SVG, PNG and CSV, and return their paths."""
    paths = (
        changes(analysis, folder)
        + energies(analysis, folder)
        + groups(analysis, folder, "kind")
        + groups(analysis, folder, "block")
    )
    return paths + (angles(analysis, folder) if analysis.adapted else [])


@styled
def changes(analysis: Analysis, folder: Path) -> list[Path]:
    """Save figure 1a: the norm and direction change of each layer, as (mean, standard deviation) over its rows in percent.

    A star marks the mean of layers. Both panels have the same linear axes, as in the paper. The few layers far beyond all
    others are named at the edge.
    """
    figure, panels = canvas(2, height=3.6, sharex=True, sharey=True)
    rows = [
        {"layer": layer.name, "change": title, "mean": 100 * mean, "std": 100 * std}
        for change, title in CHANGES
        for layer in analysis.layers
        if (mean := getattr(layer, f"{change}_mean")) is not None and (std := getattr(layer, f"{change}_std")) is not None
    ]
    right, top = (
        max(_reach([row[column] for row in rows if row["change"] == title]) for _, title in CHANGES)
        for column in ("mean", "std")
    )
    for index, (axes, (change, title)) in enumerate(zip(panels, CHANGES, strict=True)):
        style, points = look(index), [row for row in rows if row["change"] == title]
        x, y = ([row[column] for row in points] for column in ("mean", "std"))
        axes.scatter(x, y, s=18, c=style.colour, marker=style.marker, alpha=0.6, linewidths=0)
        mean, std = (100 * (analysis.mean(f"{change}_{what}") or 0.0) for what in ("mean", "std"))
        axes.scatter([mean], [std], s=190, c=style.colour, marker="*", edgecolors=INK, linewidths=0.9, zorder=3)
        axes.set_title(f"{title}\nmean {mean:.2g} %, deviation {std:.2g} %")
        axes.set_xlabel("mean over a layer's rows (%)")
        beyond = sorted((row for row in points if row["mean"] > right or row["std"] > top), key=lambda row: -row["mean"])
        if beyond:
            note = [f"{row['layer']}: {row['mean']:.1f}, {row['std']:.1f} ↗" for row in beyond[:3]]
            note += [f"and {len(beyond) - 3} more ↗"] if len(beyond) > 3 else []
            axes.annotate("\n".join(note), (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=7)
    panels[0].set_ylabel("standard deviation\nover a layer's rows (%)")
    panels[0].set(xlim=(-0.03 * right, right), ylim=(-0.03 * top, top))
    return save_figure(figure, folder, "figure-1a", rows)


def _reach(values: Sequence[float]) -> float:
    """Return the end of an axis that starts at zero: the largest value up to twice the 97th percentile."""
    ranked = sorted(values) or [0.0]
    usual = 2 * ranked[int(0.97 * (len(ranked) - 1))]
    return 1.08 * max(value for value in ranked if value <= usual) or 1.0


@styled
def energies(analysis: Analysis, folder: Path) -> list[Path]:
    """Save figure 1b: the share of the residual's energy in its largest singular values, for each layer and their mean."""
    figure, (axes,) = canvas(1, width=5.0)
    x = [100 * share for share in FRACTIONS]
    curves = {layer.name: _percents(layer.energy) for layer in analysis.layers if layer.energy is not None}
    for curve in curves.values():
        axes.plot(x, curve, color=FAINT, linewidth=0.5, alpha=0.45)
    middle = [fmean(values) for values in zip(*curves.values(), strict=True)]  # NaN where one of them is
    style, energy_30 = look(0), analysis.mean("energy_30")
    if energy_30 is not None:
        axes.plot(x, middle, linestyle=style.dashes, color=style.colour, linewidth=2.2, label=f"mean of {len(curves)} layers")
        axes.plot([], [], color=FAINT, linewidth=0.8, label="each layer")
        axes.axvline(100 * SHARE, color=INK, linestyle=":", linewidth=1)
        note = f"{100 * energy_30:.1f} % at {100 * SHARE:.0f} %"
        axes.annotate(note, (100 * SHARE, 100 * energy_30), (10, -24), textcoords="offset points")
        axes.legend(loc="lower right")
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="rank (% of full rank)")
    axes.set_ylabel("cumulative energy of\nthe direction residual (%)")
    columns = {"percent_of_full_rank": x, "mean": middle, **curves}
    return save_figure(
        figure, folder, "figure-1b", [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]
    )


def _percents(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else 100 * value for value in values]


@styled
def groups(analysis: Analysis, folder: Path, key: str) -> list[Path]:
    """Save the norm and direction change of every layer, and their mean, by ``kind`` of layer or ``block`` along the network.

    Both panels have the same logarithmic axis. Values below `FLOOR` are drawn there, labelled as about zero.
    """
    means = groups_table(analysis, key)
    figure, panels = canvas(2, height=0.9 + 0.24 * len(means), sharex=True, sharey=True)
    members = analysis.by(key)
    for index, (axes, (change, title)) in enumerate(zip(panels, CHANGES, strict=True)):
        style = look(index)
        for place, group in enumerate(members.values()):
            x = _floored([getattr(layer, f"{change}_mean") for layer in group])
            axes.scatter(x, [place] * len(x), s=14, c=style.colour, marker=style.marker, alpha=0.45, linewidths=0)
        x = _floored([row[f"{change}_mean"] for row in means])
        axes.scatter(x, range(len(means)), s=110, c=INK, marker="|", linewidths=1.8)
        axes.set_xlabel(f"{title} (%)")
        axes.grid(visible=False, axis="y")
    values = [
        value for layer in analysis.layers for change, _ in CHANGES if (value := getattr(layer, f"{change}_mean")) is not None
    ]
    panels[0].set_xscale("log")
    plain_labels(panels[0].xaxis)
    panels[0].set_xlim(FLOOR / 1.6, 1.6 * max(100 * max(values, default=0.0), 100 * FLOOR))
    panels[0].xaxis.set_major_formatter(lambda value, _: "≈ 0" if value <= FLOOR else f"{value:g}")
    panels[0].set_yticks(range(len(means)), [f"{row[key]} ({row['layers']})" for row in means])
    panels[0].invert_yaxis()
    return save_figure(figure, folder, f"by-{key}", means)


def _floored(values: Sequence[float | None]) -> list[float]:
    return [value if math.isnan(value) else max(value, FLOOR) for value in _percents(values)]


@styled
def angles(analysis: Analysis, folder: Path) -> list[Path]:
    """Save the histogram of a LoRaD student's angles, and the effective rank of each layer's angles."""
    figure, (left, right) = canvas(2)
    counts = [sum(layer.angles.counts[i] for layer in analysis.adapted if layer.angles) for i in range(len(EDGES) - 1)]
    rows = [{"from_rad": low, "to_rad": high, "count": n} for low, high, n in zip(EDGES, EDGES[1:], counts, strict=False)]
    shown = max((max(abs(row["from_rad"]), abs(row["to_rad"])) for row in rows if row["count"]), default=0.1)
    left.stairs(counts, EDGES, fill=True, color=look(0).colour)
    left.set_yscale("log")
    plain_labels(left.yaxis)
    left.set(xlim=(-shown, shown), xlabel="angle (rad)", ylabel="angles per bin of 0.02 rad")
    left.set_title(f"{sum(counts):,} angles in {len(analysis.adapted)} layers")
    ranks = [layer.angles for layer in analysis.adapted if layer.angles]
    for index, (name, values) in enumerate(
        {"effective rank": [a.effective_rank for a in ranks], "99 % of the energy": [float(a.rank_99) for a in ranks]}.items()
    ):
        style = look(index)
        right.scatter(
            [a.full for a in ranks], values, s=16, c=style.colour, marker=style.marker, alpha=0.7, label=name, linewidths=0
        )
    top, given = max(a.full for a in ranks), max(a.rank for a in ranks)
    right.plot([0, min(given, top), top], [0, min(given, top), min(given, top)], color=INK, linewidth=0.9, linestyle="--")
    right.annotate(f"rank given: {given}", (top, min(given, top)), (0, 3), textcoords="offset points", ha="right")
    right.set(xlabel="full rank of the layer's angles", ylabel="rank", xlim=(0, None), ylim=(0, 1.25 * min(given, top)))
    right.legend(loc="lower right")
    return save_figure(figure, folder, "angles", rows)


@styled
def bars(scores: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], folder: Path, name: str = "figure-1c") -> list[Path]:
    """Save figure 1c: one panel for each metric of the hybrids, with a bar and its spread for each hybrid.

    Args:
        scores: rows with ``name``, and for each metric its value and ``METRIC_spread``.
        metrics: titles by metric.
    """
    figure, panels = canvas(len(metrics), height=3.0)
    for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
        for place, score in enumerate(scores):
            style = look(place)
            axes.bar(
                place, score[metric], 0.62, yerr=score[f"{metric}_spread"], color=style.colour, hatch=style.hatch,
                edgecolor="white", capsize=3, error_kw={"ecolor": INK, "linewidth": 1},
            )  # fmt: skip
            top = score[metric] + score[f"{metric}_spread"]
            axes.annotate(f"{score[metric]:.3g}", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(range(len(scores)), [score["name"].replace(", ", ",\n") for score in scores], fontsize=7.5)
        axes.set_title(title)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.18)
    return save_figure(figure, folder, name, [dict(score) for score in scores])


@styled
def bars_across(
    scores: Sequence[Mapping[str, Any]],
    student: Mapping[str, Any],
    metric: str,
    title: str,
    folder: Path,
    name: str = "swap-by-kind",
) -> list[Path]:
    """Save one metric of the hybrids, with a bar for each kind of layer exchanged and a line at the student's own value."""
    figure, (axes,) = canvas(1, width=6.0, height=0.9 + 0.26 * len(scores))
    style = look(1)
    axes.barh(
        range(len(scores)), [score[metric] for score in scores], 0.62, xerr=[score[f"{metric}_spread"] for score in scores],
        color=style.colour, hatch=style.hatch, edgecolor="white", capsize=2, error_kw={"ecolor": INK, "linewidth": 1},
    )  # fmt: skip
    axes.axvline(student[metric], color=INK, linestyle="--", linewidth=1, label=f"{student['name']}: {student[metric]:.3g}")
    axes.set_yticks(range(len(scores)), [score["name"] for score in scores])
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right")
    return save_figure(figure, folder, name, [dict(student), *map(dict, scores)])
