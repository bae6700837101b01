"""The files of an analysis: ``analysis.json``, ``layers.csv``, ``analysis.md`` and the figures."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wadi.analysis import plots
from wadi.analysis.analyze import Analysis, Layer, groups_table
from wadi.analysis.angles import EDGES
from wadi.analysis.spectrum import FRACTIONS
from wadi.io.figures import csv_table
from wadi.io.files import write_whole
from wadi.io.markdown import code_span, escape, split_at_markers, write_between_markers
from wadi.io.markdown import table as markdown_table
from wadi.io.regular import read_bytes, read_text

JSON = "analysis.json"
# All files of an analysis. A folder with other files is not replaced.
FIGURES = ("figure-1[a-d]", "by-kind", "by-block", "angles", "swap-by-kind")
KNOWN = (
    JSON, "layers.csv", "analysis.md", "swap.json", *(name + end for name in FIGURES for end in (".png", ".svg", ".csv")),
)  # fmt: skip
DEFINITIONS = {
    "norm_mean": "mean over a layer's rows of abs(|s| - |w|) / |w|; _std: standard deviation over them",
    "direction_mean": "mean over a layer's rows of 1 - cos(w, s); _std: standard deviation over them",
    "angle_mean": "mean over a layer's rows of the angle between w and s, in radians",
    "norm_chance": "norm_mean if s were w with noise that gives the same direction changes",
    "energy": "cumulative energy of the residual s/|s| - w/|w| at energy_fractions of full rank; energy_30: at 30 %",
    "energy_missing": "by how much the true energy_30 may be larger; 0 where the spectrum is exact",
    "effective_rank": "exp of the entropy of the singular values of Theta taken as shares of their sum",
    "summary": "means over layers",
}
_SUMMARY = (
    "norm_mean", "norm_std", "norm_chance", "direction_mean", "direction_std", "angle_mean", "energy_30", "energy_missing",
)  # fmt: skip


def write(analysis: Analysis, folder: Path) -> list[Path]:
    """Write all files of an analysis into an existing ``folder``, and return the paths of the figures."""
    (folder / JSON).write_text(json.dumps(as_json(analysis), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "layers.csv").write_bytes(csv_table([layer_row(layer) for layer in analysis.layers]))
    (folder / "analysis.md").write_text(markdown(analysis), encoding="utf-8")
    return plots.draw_all(analysis, folder)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Return the whole analysis as plain values."""
    values = asdict(analysis)
    for layer in values["layers"]:
        if layer["angles"] is not None:
            layer["angles"].pop("counts")  # summed below; by layer they would be most of the file
    counts = [sum(bin_counts) for bin_counts in zip(*(a.angles.counts for a in analysis.adapted if a.angles), strict=True)]
    return {
        "definitions": DEFINITIONS,
        "energy_fractions": list(FRACTIONS),
        "summary": {"layers": len(analysis.layers), **{metric: analysis.mean(metric) for metric in _SUMMARY}},
        "by_kind": groups_table(analysis, "kind"),
        "by_block": groups_table(analysis, "block"),
        "angles": {"edges": list(EDGES), "counts": counts} if counts else None,
        **values,
    }


def layer_row(layer: Layer) -> dict[str, Any]:
    """Return a layer as one line of the CSV."""
    values = asdict(layer)
    rows, fan_in = values.pop("shape")
    del values["energy"]
    angles = values.pop("angles") or {}
    columns = ("rank", "full", "rms", "largest", "beyond", "effective_rank", "rank_99")
    return {
        "name": values.pop("name"), "kind": values.pop("kind"), "block": values.pop("block"), "rows": rows, "fan_in": fan_in,
        **values, **{f"angle_{metric}": angles.get(metric) for metric in columns},
    }  # fmt: skip


def percent(value: float | None, digits: int = 2) -> str:
    """Return ``2.21 %``, powers of ten for small values, or a dash for None."""
    if value is None:
        return "-"
    small = 0 < abs(value) < 0.5 * 10 ** (-digits - 2)
    return f"{100 * value:.0e} %" if small else f"{100 * value:.{digits}f} %"


def markdown(analysis: Analysis) -> str:
    """Return the analysis as Markdown tables.

    They show all layers, kinds and blocks, the layers that turned most, and the tensors that were not compared.
    """
    changes = [
        (title, percent(analysis.mean(f"{change}_mean"), 3), percent(analysis.mean(f"{change}_std"), 3))
        for change, title in plots.CHANGES
    ]
    parts = [
        f"{len(analysis.layers)} layers; means over layers.\n",
        markdown_table(("", "mean over a layer's rows", "standard deviation over them"), changes),
        f"\n{_ratio(analysis)} Energy of the direction residual in the "
        f"top 30 % of singular values: {percent(analysis.mean('energy_30'), 1)}{_uncertain(analysis)}.\n",
        "![Norm and direction change](figure-1a.png)\n\n![Energy over rank](figure-1b.png)",
        *(f"{_groups(analysis, key)}\n\n![By {key}](by-{key}.png)" for key in ("kind", "block")),
        _most(analysis),
    ]
    if analysis.adapted:
        parts.append(f"{_angles(analysis)}\n\n![Angles](angles.png)")
    parts += [f"\n{line}" for line in left_out(analysis)]
    return "\n".join(parts) + "\n"


def _ratio(analysis: Analysis) -> str:
    direction, norm = analysis.mean("direction_mean"), analysis.mean("norm_mean")
    if direction is None or norm is None:
        return "No layer has rows to compare."
    if norm <= 1e-6:
        return "Norms changed by rounding at most."
    return (
        f"Direction change over norm change: {direction / norm:.3g}. The mean angle is {analysis.mean('angle_mean'):.3g} rad. "
        f"Noise with the same direction changes would change norms by {percent(analysis.mean('norm_chance'), 3)}."
    )


def _most(analysis: Analysis, count: int = 8) -> str:
    """Return the layers whose directions changed most."""
    turned = sorted(
        (layer for layer in analysis.layers if layer.direction_mean), key=lambda layer: -(layer.direction_mean or 0)
    )
    rows = [
        (code_span(layer.name), percent(layer.norm_mean, 3), percent(layer.direction_mean, 3), percent(layer.energy_30, 1))
        for layer in turned[:count]
    ]
    return (
        "\n" + markdown_table(("turned most", "norm change", "direction change", "energy in the top 30 %"), rows)
        if rows
        else ""
    )


def _uncertain(analysis: Analysis) -> str:
    sketched = [layer for layer in analysis.layers if not layer.exact]
    missing = analysis.mean("energy_missing", sketched)
    return f" ({len(sketched)} layers sketched: up to {percent(missing, 1)} more there)" if missing is not None else ""


def _groups(analysis: Analysis, key: str) -> str:
    rows = [
        (
            escape(row[key]),
            row["layers"],
            percent(row["norm_mean"], 3),
            percent(row["direction_mean"], 3),
            percent(row["energy_30"], 1),
        )
        for row in groups_table(analysis, key)
    ]
    return "\n" + markdown_table((key, "layers", "norm change", "direction change", "energy in the top 30 %"), rows)


def _angles(analysis: Analysis) -> str:
    layer_angles = [layer.angles for layer in analysis.adapted if layer.angles]
    mean = {
        name: sum(getattr(a, name) for a in layer_angles) / len(layer_angles)
        for name in ("rms", "effective_rank", "rank_99", "beyond")
    }
    ranks = ", ".join(map(str, sorted({a.rank for a in layer_angles})))
    return (
        f"\nAngles of {len(layer_angles)} layers, rank {ranks} given: root mean "
        f"square {mean['rms']:.3f} rad, largest {max(a.largest for a in layer_angles):.2f} rad, {percent(mean['beyond'])} "
        f"beyond half a turn; effective rank {mean['effective_rank']:.1f}, rank of 99 % of the energy {mean['rank_99']:.1f} "
        "(means over layers)."
    )


def left_out(analysis: Analysis) -> list[str]:
    """Return a line for each kind of tensor that was not compared."""
    kinds = (
        (analysis.only_in_teacher, "only in the teacher"),
        (analysis.only_in_student, "only in the student"),
        (analysis.reshaped, "of different shapes"),
        (analysis.changed_elsewhere, "outside the layers (biases, norms) that changed"),
        ([layer.name for layer in analysis.layers if layer.undefined], "with rows of zero norm, which were left out"),
    )
    return [f"{len(names)} tensors {what} (first: {code_span(names[0])})." for names, what in kinds if names]


BEGIN, END = "<!-- wadi analyze: begin -->", "<!-- wadi analyze: end -->"


def write_page(page: Path, folder: Path, command: str) -> None:
    """Put the tables of the analysis in ``folder`` between the markers of a page, and its figures into ``images/`` next to it.

    Raises:
        WadiError: if the page has no such markers, or cannot be written.
    """
    split_at_markers(page, BEGIN, END)  # before the images are written
    tables = re.sub(r"\]\(([\w-]+\.png)\)", r"](images/analysis-\1)", read_text(folder / "analysis.md"))
    for image in sorted(folder.glob("*.png")):
        write_whole(page.parent / "images" / f"analysis-{image.name}", read_bytes(image))
    write_between_markers(page, BEGIN, END, f"{code_span(command)}\n\n{tables.rstrip()}")
