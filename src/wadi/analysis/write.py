"""An analysis on disk: ``analysis.json``, ``layers.csv``, ``analysis.md`` and the figures."""

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
from wadi.io.figures import table
from wadi.io.files import write_whole
from wadi.io.markdown import code, split_at_markers, text, write_between_markers
from wadi.io.markdown import table as markdown_table
from wadi.io.regular import read_bytes, read_text

JSON = "analysis.json"
# Every file that an analysis may consist of; a folder with others is not replaced.
FIGURES = ("figure-1[a-d]", "by-kind", "by-block", "angles", "swap-by-kind")
KNOWN = (
    JSON, "layers.csv", "analysis.md", "swap.json", *(name + end for name in FIGURES for end in (".png", ".svg", ".csv")),
)  # fmt: skip
DEFINITIONS = {
    "norm_mean": "mean over a layer's rows of abs(|s| - |w|) / |w|; _std: standard deviation over them",
    "direction_mean": "mean over a layer's rows of 1 - cos(w, s); _std: standard deviation over them",
    "energy": "cumulative energy of the residual s/|s| - w/|w| at energy_fractions of full rank; energy_30: at 30 %",
    "energy_missing": "by how much the true energy_30 may be larger; 0 where the spectrum is exact",
    "effective_rank": "exp of the entropy of the singular values of Theta taken as shares of their sum",
    "summary": "means over layers",
}
_SUMMARY = ("norm_mean", "norm_std", "direction_mean", "direction_std", "energy_30", "energy_missing")


def write(found: Analysis, folder: Path) -> list[Path]:
    """Write all of it into an existing ``folder``; returns the figures' paths."""
    (folder / JSON).write_text(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "layers.csv").write_bytes(table([layer_row(layer) for layer in found.layers]))
    (folder / "analysis.md").write_text(markdown(found), encoding="utf-8")
    return plots.draw_all(found, folder)


def as_json(found: Analysis) -> dict[str, Any]:
    """The whole analysis as plain values."""
    values = asdict(found)
    for layer in values["layers"]:
        if layer["angles"] is not None:
            layer["angles"].pop("counts")  # summed up below: by layer they would outweigh all the rest
    counts = [sum(bin_counts) for bin_counts in zip(*(a.angles.counts for a in found.adapted if a.angles), strict=True)]
    return {
        "definitions": DEFINITIONS,
        "energy_fractions": list(FRACTIONS),
        "summary": {"layers": len(found.layers), **{figure: found.mean(figure) for figure in _SUMMARY}},
        "by_kind": groups_table(found, "kind"),
        "by_block": groups_table(found, "block"),
        "angles": {"edges": list(EDGES), "counts": counts} if counts else None,
        **values,
    }


def layer_row(layer: Layer) -> dict[str, Any]:
    """A layer as one line of the CSV."""
    values = asdict(layer)
    rows, fan_in = values.pop("shape")
    del values["energy"]
    angles = values.pop("angles") or {}
    told = ("rank", "full", "rms", "largest", "beyond", "effective_rank", "rank_99")
    return {
        "name": values.pop("name"), "kind": values.pop("kind"), "block": values.pop("block"), "rows": rows, "fan_in": fan_in,
        **values, **{f"angle_{figure}": angles.get(figure) for figure in told},
    }  # fmt: skip


def percent(value: float | None, digits: int = 2) -> str:
    """``2.21 %``; a dash for None, and small values in powers of ten."""
    if value is None:
        return "-"
    small = 0 < abs(value) < 0.5 * 10 ** (-digits - 2)
    return f"{100 * value:.0e} %" if small else f"{100 * value:.{digits}f} %"


def markdown(found: Analysis) -> str:
    """The analysis as Markdown tables: the whole, by kind and by block, the layers that turned most, and what was left out."""
    changes = [
        (title, percent(found.mean(f"{change}_mean"), 3), percent(found.mean(f"{change}_std"), 3))
        for change, title in plots.CHANGES
    ]
    parts = [
        f"{len(found.layers)} layers; means over layers.\n",
        markdown_table(("", "mean over a layer's rows", "standard deviation over them"), changes),
        f"\n{_ratio(found.mean('direction_mean'), found.mean('norm_mean'))} Energy of the direction residual in the top 30 % "
        f"of singular values: {percent(found.mean('energy_30'), 1)}{_uncertain(found)}.\n",
        "![Norm and direction change](figure-1a.png)\n\n![Energy over rank](figure-1b.png)",
        *(f"{_groups(found, key)}\n\n![By {key}](by-{key}.png)" for key in ("kind", "block")),
        _most(found),
    ]
    if found.adapted:
        parts.append(f"{_angles(found)}\n\n![Angles](angles.png)")
    parts += [f"\n{line}" for line in left_out(found)]
    return "\n".join(parts) + "\n"


def _ratio(direction: float | None, norm: float | None) -> str:
    if direction is None or norm is None:
        return "No layer has rows to compare."
    return (
        f"Direction change over norm change: {direction / norm:.3g}." if norm > 1e-6 else "Norms changed by rounding at most."
    )


def _most(found: Analysis, count: int = 8) -> str:
    """The layers whose directions changed most."""
    turned = sorted((layer for layer in found.layers if layer.direction_mean), key=lambda layer: -(layer.direction_mean or 0))
    rows = [
        (code(layer.name), percent(layer.norm_mean, 3), percent(layer.direction_mean, 3), percent(layer.energy_30, 1))
        for layer in turned[:count]
    ]
    return (
        "\n" + markdown_table(("turned most", "norm change", "direction change", "energy in the top 30 %"), rows)
        if rows
        else ""
    )


def _uncertain(found: Analysis) -> str:
    sketched = [layer for layer in found.layers if not layer.exact]
    missing = found.mean("energy_missing", sketched)
    return f" ({len(sketched)} layers sketched: up to {percent(missing, 1)} more there)" if missing is not None else ""


def _groups(found: Analysis, key: str) -> str:
    rows = [
        (
            text(row[key]),
            row["layers"],
            percent(row["norm_mean"], 3),
            percent(row["direction_mean"], 3),
            percent(row["energy_30"], 1),
        )
        for row in groups_table(found, key)
    ]
    return "\n" + markdown_table((key, "layers", "norm change", "direction change", "energy in the top 30 %"), rows)


def _angles(found: Analysis) -> str:
    known = [layer.angles for layer in found.adapted if layer.angles]
    mean = {name: sum(getattr(a, name) for a in known) / len(known) for name in ("rms", "effective_rank", "rank_99", "beyond")}
    given = ", ".join(map(str, sorted({a.rank for a in known})))
    return (
        f"\nAngles of {len(known)} layers, rank {given} given: root mean "
        f"square {mean['rms']:.3f} rad, largest {max(a.largest for a in known):.2f} rad, {percent(mean['beyond'])} beyond "
        f"half a turn; effective rank {mean['effective_rank']:.1f}, rank of 99 % of the energy {mean['rank_99']:.1f} (means "
        "over layers)."
    )


def left_out(found: Analysis) -> list[str]:
    """A line for each sort of tensor that was not compared."""
    sorts = (
        (found.only_in_teacher, "only in the teacher"),
        (found.only_in_student, "only in the student"),
        (found.reshaped, "of different shapes"),
        (found.changed_elsewhere, "changed that are no layers (biases, norms)"),
        ([layer.name for layer in found.layers if layer.undefined], "with rows of zero norm, which were left out"),
    )
    return [f"{len(names)} tensors {what} (first: {code(names[0])})." for names, what in sorts if names]


BEGIN, END = "<!-- wadi analyze: begin -->", "<!-- wadi analyze: end -->"


def write_page(page: Path, folder: Path, command: str) -> None:
    """Put the tables of an analysis in ``folder`` between the markers of a page, its figures into ``images/`` beside that.

    Raises:
        WadiError: if the file has no such markers, or cannot be written.
    """
    split_at_markers(page, BEGIN, END)  # before the images are written
    tables = re.sub(r"\]\(([\w-]+\.png)\)", r"](images/analysis-\1)", read_text(folder / "analysis.md"))
    for picture in sorted(folder.glob("*.png")):
        write_whole(page.parent / "images" / f"analysis-{picture.name}", read_bytes(picture))
    write_between_markers(page, BEGIN, END, f"{code(command)}\n\n{tables.removesuffix(chr(10))}")
