"""``report.html`` of a run: one self-contained page that a person who was not there can judge the run from."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wadi.distill.run_folder import read_stats
from wadi.errors import WadiError
from wadi.io.figures import canvas, figure_svg, look, plain_labels, styled
from wadi.io.files import write_whole
from wadi.io.metric_names import SPEED_LABELS, metric_label
from wadi.io.records import Record, asdict, read_json
from wadi.io.regular import read_bytes, read_text

# Figures: (title, what to make of it, series, logarithmic axis)
CURVES: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    (
        "Losses",
        "The student's loss says nothing of quality; the fake model's should fall, then stay.",
        ("loss_student", "loss_fake"),
        True,
    ),
    (
        "Teacher-fake distance by quarter of the schedule",
        "How far the two predicted images are apart: the distillation is done where it stops falling.",
        tuple(f"teacher_fake_distance_q{i}" for i in range(1, 5)),
        False,
    ),
    ("Angles, RMS (rad)", "Steady growth that slows is healthy.", ("student_angle_rms", "fake_angle_rms"), False),
    ("Gradient norms", "Before clipping.", ("student_grad_norm", "fake_grad_norm"), True),
    (
        "Student's grid against the teacher's",
        "Same-prompt diversity and contrast as shares of the teacher's: near 1 is well, falling is collapse.",
        ("diversity_ratio", "contrast_ratio"),
        False,
    ),
    ("Images per second", "Training throughput of one process.", ("images_per_second",), False),
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } img, svg { max-width: 100%; height: auto }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { color: #555; font-size: .9rem } table { border-collapse: collapse }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem } details { margin: 1rem 0 }
"""


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` from the run's config, statistics and sample grids; returns its path.

    Raises:
        WadiError: if the folder is no run, or has no statistics yet.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise WadiError(f"{str(run)!r} is no run: it holds no config.yaml. Expected the --out of `wadi distill`.")
    lines = read_stats(run / "stats.jsonl")
    if not lines:
        raise WadiError(f"Run {str(run)!r} has no statistics. Expected at least one step: run `wadi distill` first.")
    grids = sorted((run / "samples").glob("step-*.png"))
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        _summary(lines),
        "<h2>Same noise, same prompts: teacher and student</h2>" + _grids(grids),
        '<h2>Curves</h2><div class="figures">' + "".join(_figures(lines)) + "</div>",
        _measured(run),
        _analysis(run / "analysis"),
        f"<h2>Configuration</h2><pre>{html.escape(read_text(config))}</pre>",
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>{STYLE}</style>'
    target = run / "report.html"
    write_whole(target, (head + "\n".join(parts)).encode())
    return target


def _summary(lines: Sequence[dict[str, float]]) -> str:
    """The last value of what a reader asks first, as a table."""
    import torch

    last: dict[str, float] = {}
    for line in lines:
        last |= line
    rows = [("steps", f"{last['step']:.0f}"), ("time in the loop", f"{last['seconds'] / 60:.1f} min")]
    speeds = sorted(line["images_per_second"] for line in lines if "images_per_second" in line)
    if speeds:
        rows.append(("training, median", f"{speeds[len(speeds) // 2]:.1f} images/s"))
    if "teacher_ms_per_image" in last:
        teacher, student = last["teacher_ms_per_image"], last["student_ms_per_image"]
        rows.append(
            ("per image, decoding included", f"teacher {teacher:.0f} ms, student {student:.0f} ms ({teacher / student:.1f}x)")
        )
    if "diversity_ratio" in last:
        rows.append(("same-prompt diversity", f"{last['diversity_ratio']:.0%} of the teacher's"))
    rows += [("steps left out (non-finite gradient)", f"{last['skipped']:.0f}"), ("torch", torch.__version__)]
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _grids(grids: Sequence[Path]) -> str:
    """The last grid in full, the earlier ones to unfold."""
    if not grids:
        return "<p>No sample grid was drawn.</p>"
    names = [html.escape(path.stem) for path in grids]  # quotes too: a name is text wherever it stands
    shown = [
        f'<p>{name}</p><img alt="{name}" src="{_inline(path)}">' for name, path in reversed([*zip(names, grids, strict=True)])
    ]
    earlier = "".join(shown[1:])
    return shown[0] + (f"<details><summary>Over training</summary>{earlier}</details>" if earlier else "")


def _measured(run: Path) -> str:
    """A table for each result of `wadi eval` in ``run/eval``, and for that of the hybrids in ``run/analysis``."""
    files = sorted((run / "eval").glob("*.json")) + sorted((run / "analysis").glob("swap.json"))
    tables = [_result(path) for path in files]
    return "<h2>Measured</h2>" + "".join(tables) if tables else ""


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
    """The measurements of one generator."""

    name: str
    images: int
    metrics: dict[str, Number]
    speed: Timing | None = None


class Result(Record):
    """What the report shows of a result of ``wadi eval``."""

    rows: list[Row]
    protocol: dict[str, Any]
    protocol_hash: str


def _result(path: Path) -> str:
    """Metrics and speed of a result file, a row for each generator; rows of one protocol hash may be compared."""
    try:
        found: Result = read_json(path, Result)
    except WadiError as error:
        return f"<p>{html.escape(path.name)} is not a result of wadi eval and was left out ({html.escape(str(error))}).</p>"
    metrics = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    measured = [asdict(row.speed or Timing()) for row in found.rows]
    speeds = [name for name in SPEED_LABELS if any(speed[name] is not None for speed in measured)]
    cells = [
        [*(_number(row.metrics.get(name)) for name in metrics), *(_speed(speed[name]) for name in speeds)]
        for row, speed in zip(found.rows, measured, strict=True)
    ]
    told = f"{found.protocol.get('protocol') or 'pictures'}, protocol hash {found.protocol_hash[:12]}"
    head = ["", "images", *map(metric_label, metrics), *(SPEED_LABELS[name] for name in speeds)]
    body = [[row.name, row.images, *values] for row, values in zip(found.rows, cells, strict=True)]
    return f"<h3>{html.escape(path.stem)}: {html.escape(told)}</h3>{_html_table([head, *body])}"


def _number(number: Number | None) -> str:
    if number is None:
        return ""
    return f"{number.value:.4g}" + ("" if number.std is None else f" ± {number.std:.2g}")


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _html_table(lines: Sequence[Sequence[object]]) -> str:
    cells = [[html.escape(str(cell)) for cell in line] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


# Of `wadi analyze --out RUN/analysis`: file, what to make of it
ANALYSIS = (
    (
        "figure-1a",
        "A point per layer, a star at their mean: how far norms and directions of the weights went from the teacher's.",
    ),
    ("figure-1b", "How much of the change of directions few singular values hold."),
    ("by-kind", "Which kinds of layers changed; a bar at their mean."),
    ("by-block", "Where along the network."),
    ("angles", "How often each angle occurs; the rank of each layer's angles."),
    ("figure-1c", "The student, and hybrids with the teacher's norms or directions put back."),
    ("figure-1d", "Pictures of the same hybrids."),
    ("swap-by-kind", "The teacher's directions put back in one kind of layer: the worse, the more that kind had learned."),
)


class Summary(Record):
    """Means over the layers, as shares of 1."""

    layers: int
    norm_mean: float | None
    norm_std: float | None
    direction_mean: float | None
    direction_std: float | None
    energy_30: float | None


class Analysis(Record):
    """What the report shows of a result of ``wadi analyze``."""

    summary: Summary


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _analysis(folder: Path) -> str:
    """The analysis of the weights, if the run has one: its summary and figures."""
    path = folder / "analysis.json"
    if not path.exists():
        return ""
    try:
        analysis: Analysis = read_json(path, Analysis)
    except WadiError as error:
        return f"<p>{html.escape(path.name)} is not a result of wadi analyze and was left out ({html.escape(str(error))}).</p>"
    found = analysis.summary
    rows = [
        ("norm change", _percent(found.norm_mean), _percent(found.norm_std)),
        ("direction change", _percent(found.direction_mean), _percent(found.direction_std)),
    ]
    energy = found.energy_30
    told = (
        "" if energy is None else f"Energy of the change of direction in the top 30 % of singular values: {100 * energy:.1f} %."
    )
    shown = [(folder / f"{name}.png", html.escape(meaning)) for name, meaning in ANALYSIS]
    figures = [
        f'<figure><img alt="{path.stem}" src="{_inline(path)}"><figcaption>{meaning}</figcaption></figure>'
        for path, meaning in shown
        if path.is_file()
    ]
    head = (f"{found.layers} layers", "mean over a layer's rows", "standard deviation over them")
    return (
        f"<h2>What changed in the weights</h2>{_html_table([head, *rows])}<p>{told}</p>"
        f'<div class="figures">{"".join(figures)}</div>'
    )


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(read_bytes(path, what="Image")).decode()


def _figures(lines: Sequence[dict[str, float]]) -> list[str]:
    """One figure per group of curves of which the run has any."""
    figures = []
    for title, meaning, names, logarithmic in CURVES:
        series = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
        series = {name: points for name, points in series.items() if points}
        if series:
            figure = plot(series, logarithmic)
            figures.append(
                f"<figure><b>{html.escape(title)}</b>{figure}<figcaption>{html.escape(meaning)}</figcaption></figure>"
            )
    return figures


@styled
def plot(series: dict[str, list[tuple[float, float]]], logarithmic: bool = False) -> str:
    """Curves over steps as an inline SVG."""
    figure, (axes,) = canvas(width=6, height=3)
    # zero, as the student's loss is at the first step, has no place on a logarithmic axis
    positive = {name: kept for name, points in series.items() if (kept := [(x, y) for x, y in points if y > 0])}
    if logarithmic and positive:
        axes.set_yscale("log")
        plain_labels(axes.yaxis)
        series = positive
    for index, (name, points) in enumerate(series.items()):
        style, few = look(index), len(points) < 20
        x, y = zip(*points, strict=True)
        axes.plot(
            x, y, linestyle=style.dashes, color=style.colour, linewidth=1.2, label=name.replace("_", " "),
            marker=style.marker if few else None, markersize=3,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above the axes: curves fill them
    drawn = figure_svg(figure).decode()
    return drawn[drawn.index("<svg") :]
