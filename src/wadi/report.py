"""``report.html`` of a run: one self-contained page that a person who was not there can judge the run from."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.files import write_whole

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
    lines = read_stats(run)
    grids = sorted((run / "samples").glob("step-*.png"))
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        _summary(lines),
        "<h2>Same noise, same prompts: teacher and student</h2>" + _grids(grids),
        '<h2>Curves</h2><div class="figures">' + "".join(_figures(lines)) + "</div>",
        f"<h2>Configuration</h2><pre>{html.escape(config.read_text(encoding='utf-8'))}</pre>",
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>{STYLE}</style>'
    target = run / "report.html"
    write_whole(target, (head + "\n".join(parts)).encode())
    return target


def read_stats(run: Path) -> list[dict[str, float]]:
    """The lines of ``stats.jsonl``; a half-written last line is left out.

    Raises:
        WadiError: if there is none.
    """
    lines = []
    path = run / "stats.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    if not lines:
        raise WadiError(f"Run {str(run)!r} has no statistics. Expected at least one step: run `wadi distill` first.")
    return lines


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
    shown = [f'<p>{path.stem}</p><img alt="{path.stem}" src="{_inline(path)}">' for path in reversed(grids)]
    earlier = "".join(shown[1:])
    return shown[0] + (f"<details><summary>Over training</summary>{earlier}</details>" if earlier else "")


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


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


def plot(series: dict[str, list[tuple[float, float]]], logarithmic: bool = False) -> str:
    """Curves over steps as an inline SVG; line styles differ, so that grey print and colour-blind readers can tell them."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes: Any = figure.add_subplot()
    # zero, as the student's loss is at the first step, has no place on a logarithmic axis
    positive = {name: kept for name, points in series.items() if (kept := [(x, y) for x, y in points if y > 0])}
    if logarithmic and positive:
        axes.set_yscale("log")
        series = positive
    for (name, points), style in zip(series.items(), ("-", "--", ":", "-."), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(
            x, y, style, linewidth=1.2, label=name.replace("_", " "), marker="o" if len(points) < 20 else None, markersize=3
        )
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue()[stream.getvalue().index("<svg") :]
