"""Write the results of a study: tables as CSV, JSON, Markdown and HTML, and the figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from wadi.distill.report import html_parts
from wadi.distill.report.page import STYLE
from wadi.io import markdown
from wadi.io.figures import csv_table
from wadi.io.files import write_whole
from wadi.io.records import asdict
from wadi.study import figures
from wadi.study.collect import ANALYSED, LABELS, RunRow, label, metrics_of
from wadi.study.summary import Pair, Spread, pairs, summarize
from wadi.study.tune import Choice

HYBRID = " with "  # in the names of metrics of a student with the teacher's norms or directions put back
NOTE = (
    "± is the standard deviation over training seeds. A difference compares runs with the same seed; ± is its standard error."
)


def write_results(
    rows: Sequence[RunRow], folder: Path, title: str, baseline: str | None = None, choices: Mapping[str, Choice] | None = None
) -> list[Path]:
    """Write all tables and figures into ``folder``; return the paths of the tables.

    Args:
        baseline: the cell that the others are compared with; None = the first one.
        choices: what tuning chose, by name of cell.
    Raises:
        WadiError: if a file cannot be written.
    """
    baseline, choices = baseline or rows[0].cell, choices or {}
    cells, found, metrics = summarize(rows), pairs(rows, baseline), metrics_of(rows)
    names = [name for name in (*LABELS, *metrics) if any(name in values for values in cells.values())]
    hybrids = [name for name in metrics if HYBRID in name]
    images = figures.draw_all(cells, [name for name in metrics if name not in hybrids], folder / "figures")
    of_weights = [name for name in names if name in ANALYSED or name in hybrids]
    of_runs = [name for name in names if name not in of_weights]
    tables = [
        summary_table(cells, of_runs, rows),
        summary_table(cells, of_weights, rows) if of_weights else [[]],
        pairs_table(found, baseline, [name for name in of_runs if name in metrics or name == "minutes"]),
        choices_table(choices),
    ]
    failed = [row for row in rows if row.status == "failed"]
    contents = {
        "runs.csv": csv_table([run_line(row, [*LABELS, *metrics]) for row in rows]),
        "cells.csv": csv_table(cell_lines(cells, names)),
        "pairs.csv": csv_table([dataclasses.asdict(pair) for pair in found]),
        "results.json": (json.dumps(as_json(rows, cells, found, choices), indent=1, allow_nan=False) + "\n").encode(),
        "results.md": _markdown(title, tables, failed, [f"figures/{path.name}" for path in images]).encode(),
        "results.html": _html(title, tables, failed, images).encode(),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def run_line(row: RunRow, names: Sequence[str]) -> dict[str, Any]:
    """Return a run as one line of the CSV."""
    varied = {name: json.dumps(v) if isinstance(v, (list, dict)) else v for name, v in row.varied.items()}
    line = {"cell": row.cell, "seed": row.seed, "status": row.status}
    return {**line, "settings": json.dumps(varied), **{name: row.values.get(name) for name in names}, "error": row.error}


def cell_lines(cells: Mapping[str, Mapping[str, Spread]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a line with mean and standard deviation of every value for each cell."""
    lines = []
    for cell, values in cells.items():
        line: dict[str, Any] = {"cell": cell, "seeds": max((of.count for of in values.values()), default=0)}
        for name in names:
            of = values.get(name)
            line |= {name: of and of.mean, f"{name} std": of and of.std}
        lines.append(line)
    return lines


def as_json(
    rows: Sequence[RunRow], cells: Mapping[str, Mapping[str, Spread]], found: Sequence[Pair], choices: Mapping[str, Choice]
) -> dict[str, Any]:
    """Return all results as plain values."""
    return {
        "runs": [dataclasses.asdict(row) for row in rows],
        "cells": {cell: {n: dataclasses.asdict(of) for n, of in values.items()} for cell, values in cells.items()},
        "pairs": [dataclasses.asdict(pair) for pair in found],
        "tuned": {cell: asdict(choice) for cell, choice in choices.items()},
    }


def summary_table(cells: Mapping[str, Mapping[str, Spread]], names: Sequence[str], rows: Sequence[RunRow]) -> list[list[str]]:
    """Return the table of means and spreads, its header first."""
    table = [["cell", "runs", *map(label, names)]]
    for cell, values in cells.items():
        own = [row.status for row in rows if row.cell == cell]
        table.append([cell, f"{own.count('done')} of {len(own)}", *(_number(name, values.get(name)) for name in names)])
    return table


def pairs_table(found: Sequence[Pair], baseline: str, names: Sequence[str]) -> list[list[str]]:
    """Return the table of differences from the baseline, its header first."""
    table = [[f"difference from {baseline}", "seeds", *map(label, names)]]
    for cell in dict.fromkeys(pair.cell for pair in found):
        own = {pair.value: pair for pair in found if pair.cell == cell}
        table.append([cell, str(max(pair.count for pair in own.values())), *(_difference(own.get(name)) for name in names)])
    return table


def choices_table(choices: Mapping[str, Choice]) -> list[list[str]]:
    """Return the table of what tuning tried and chose, its header first."""
    table = [["tuned on a seed of its own", "tried, and the metric that it reached", "chosen"]]
    for cell, of in choices.items():
        tried = [f"{value:g}: {_score(score)}" for value, score in zip(of.values, of.scores, strict=True)]
        chosen = "none" if of.chosen is None else f"{of.chosen:g}" + (", at the edge" if of.at_edge else "")
        table.append([cell, f"{of.setting}, {label(of.metric) if of.metric else of.error}: {', '.join(tried)}", chosen])
    return table


def _score(score: float | None) -> str:
    return "failed" if score is None else f"{score:.4g}"


def _number(name: str, of: Spread | None) -> str:
    if of is None:
        return ""
    if name in ("parameters", "steps") and not of.std:
        return f"{of.mean:,.0f}"
    scale, unit = (100, " %") if name in figures.PERCENT or name == "energy_30" else (1, "")
    return f"{scale * of.mean:.4g}" + ("" if of.std is None else f" ± {scale * of.std:.2g}") + unit


def _difference(pair: Pair | None) -> str:
    if pair is None:
        return ""
    error = "" if pair.error is None else f" ± {pair.error:.2g}"
    return f"{pair.mean:+.4g}{error} (lower at {pair.lower}, higher at {pair.higher})"


def _markdown(title: str, tables: Sequence[list[list[str]]], failed: Sequence[RunRow], images: Sequence[str]) -> str:
    parts = [f"# {markdown.escape(title)}"]
    for header, *body in tables:
        if body:
            parts.append(markdown.table(list(map(markdown.escape, header)), [list(map(markdown.escape, row)) for row in body]))
    parts.append(NOTE)
    if failed:
        lines = [
            f"- {markdown.code_span(f'{row.cell}, seed {row.seed}')}: {markdown.escape(row.error or '')}" for row in failed
        ]
        parts.append("## Runs that failed\n\n" + "\n".join(lines))
    parts += [f"![{Path(image).stem}]({image})" for image in images]
    return "\n\n".join(parts) + "\n"


def _html(title: str, tables: Sequence[list[list[str]]], failed: Sequence[RunRow], images: Sequence[Path]) -> str:
    parts = [f"<h1>{escape(title)}</h1>", *(html_parts.table(table) for table in tables if len(table) > 1)]
    parts.append(f"<p>{escape(NOTE)}</p>")
    if failed:
        rows = [("cell", "seed", "error"), *((row.cell, row.seed, row.error or "") for row in failed)]
        parts.append(f"<h2>Runs that failed</h2>{html_parts.table(rows)}")
    parts.append(html_parts.figures([html_parts.figure(html_parts.image(path), path.stem) for path in images]))
    head = f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return head + "\n".join(parts)
