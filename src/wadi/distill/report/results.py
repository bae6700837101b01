"""Tables and figures of what other commands wrote into a run's folder: ``wadi eval``, ``wadi swap`` and ``wadi analyze``."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from wadi.distill.report import html_parts
from wadi.errors import WadiError
from wadi.io.metric_names import SPEED_LABELS, metric_label
from wadi.io.records import Record, asdict, read_json

# Figures of `wadi analyze --out RUN/analysis` and their captions.
FIGURES = {
    "figure-1a": "One point per layer, a star at the mean: change of the weights' norms and directions from the teacher's.",
    "figure-1b": "Share of the change of directions in the largest singular values.",
    "by-kind": "Change by kind of layer; the bar marks the mean.",
    "by-block": "Change along the network.",
    "angles": "Distribution of the angles; rank of each layer's angles.",
    "figure-1c": "The student, and hybrids that have the teacher's norms or directions.",
    "figure-1d": "Images of the same hybrids.",
    "swap-by-kind": "The teacher's directions in one kind of layer. The worse the result, the more this kind has learned.",
}


# --- wadi eval --------------------------------------------------------------------------------------------------------------


class Number(Record):
    """A metric with its standard deviation."""

    value: float
    std: float | None = None


class Timing(Record):
    """The speed of a generator on one machine."""

    images_per_second: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    peak_memory_mib: float | None = None
    parameters: int | None = None
    evaluations: float | None = None


class Row(Record):
    """The metrics and the speed of one generator."""

    name: str
    images: int
    metrics: dict[str, Number]
    speed: Timing | None = None


class Result(Record):
    """The fields of a result of ``wadi eval`` that the report shows."""

    rows: list[Row]
    protocol: dict[str, Any]
    protocol_hash: str


def evaluations(run: Path) -> str:
    """Return a table for each result of ``wadi eval`` in ``run/eval``, and for the hybrids in ``run/analysis``."""
    paths = sorted((run / "eval").glob("*.json")) + sorted((run / "analysis").glob("swap.json"))
    tables = [evaluation(path) for path in paths]
    return "<h2>Evaluation</h2>" + "".join(tables) if tables else ""


def evaluation(path: Path) -> str:
    """Return the table of one result file: metrics and speed, one row per generator."""
    try:
        result: Result = read_json(path, Result)
    except WadiError as error:
        return _unreadable(path, "wadi eval", error)
    metrics = list(dict.fromkeys(name for row in result.rows for name in row.metrics))
    timings = [asdict(row.speed or Timing()) for row in result.rows]
    speeds = [name for name in SPEED_LABELS if any(timing[name] is not None for timing in timings)]
    head = ["", "images", *map(metric_label, metrics), *(SPEED_LABELS[name] for name in speeds)]
    body = [
        [
            row.name,
            row.images,
            *(_metric_text(row.metrics.get(name)) for name in metrics),
            *(_speed_text(timing[name]) for name in speeds),
        ]
        for row, timing in zip(result.rows, timings, strict=True)
    ]
    # only rows with the same protocol hash can be compared
    protocol = f"{result.protocol.get('protocol') or 'images'}, protocol hash {result.protocol_hash[:12]}"
    return f"<h3>{escape(path.stem)}: {escape(protocol)}</h3>{html_parts.table([head, *body])}"


def _metric_text(number: Number | None) -> str:
    if number is None:
        return ""
    return f"{number.value:.4g}" + ("" if number.std is None else f" ± {number.std:.2g}")


def _speed_text(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# --- wadi analyze -----------------------------------------------------------------------------------------------------------


class Summary(Record):
    """Means over the layers, as shares of 1."""

    layers: int
    norm_mean: float | None
    norm_std: float | None
    direction_mean: float | None
    direction_std: float | None
    energy_30: float | None
    angle_mean: float | None = None  # earlier versions did not measure these two
    norm_chance: float | None = None


class Analysis(Record):
    """The fields of a result of ``wadi analyze`` that the report shows."""

    summary: Summary


def analysis(folder: Path) -> str:
    """Return the summary and the figures of ``wadi analyze``; empty if the run has none."""
    path = folder / "analysis.json"
    if not path.exists():
        return ""
    try:
        result: Analysis = read_json(path, Analysis)
    except WadiError as error:
        return _unreadable(path, "wadi analyze", error)
    means = result.summary
    rows = [
        (f"{means.layers} layers", "mean over a layer's rows", "standard deviation over a layer's rows"),
        ("norm change", _percent(means.norm_mean), _percent(means.norm_std)),
        ("direction change", _percent(means.direction_mean), _percent(means.direction_std)),
    ]
    energy = (
        f"The largest 30 % of the singular values hold {100 * means.energy_30:.1f} % of the energy of the change of direction."
        if means.energy_30 is not None
        else ""
    )
    paths = [(folder / f"{name}.png", caption) for name, caption in FIGURES.items()]
    figures = [html_parts.figure(html_parts.image(file), caption) for file, caption in paths if file.is_file()]
    return f"<h2>What changed in the weights</h2>{html_parts.table(rows)}<p>{energy}</p>{html_parts.figures(figures)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _unreadable(path: Path, command: str, error: WadiError) -> str:
    return f"<p>{escape(path.name)} was left out: it is not a result of {command} ({escape(str(error))}).</p>"
