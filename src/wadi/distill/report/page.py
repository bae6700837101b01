"""Put the report together: a summary, sample grids, curves, results and the configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from wadi.distill.report import html_parts
from wadi.distill.report.curves import curves
from wadi.distill.report.results import analysis, evaluations
from wadi.distill.run_folder import read_stats
from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.regular import read_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } img, svg { max-width: 100%; height: auto }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { color: #555; font-size: .9rem } table { border-collapse: collapse }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem } details { margin: 1rem 0 }
"""


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` from the run's config, statistics, sample grids and results. Return its path.

    Raises:
        WadiError: if the folder is not a run, or has no statistics yet.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise WadiError(f"{str(run)!r} is not a run: it has no config.yaml. Give the --out folder of `wadi distill`.")
    lines = read_stats(run / "stats.jsonl")
    if not lines:
        raise WadiError(f"Run {str(run)!r} has no statistics. Train at least one step with `wadi distill` first.")
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        summary(lines),
        "<h2>Same noise, same prompts: teacher and student</h2>" + sample_grids(sorted((run / "samples").glob("step-*.png"))),
        "<h2>Curves</h2>" + curves(lines),
        evaluations(run),
        analysis(run / "analysis"),
        f"<h2>Configuration</h2><pre>{escape(read_text(config))}</pre>",
    ]
    head = f'<!doctype html><meta charset="utf-8"><title>{escape(run.name)}</title><style>{STYLE}</style>'
    page = run / "report.html"
    write_whole(page, (head + "\n".join(parts)).encode())
    return page


def summary(lines: Sequence[dict[str, float]]) -> str:
    """Return a table with the last value of the main statistics."""
    import torch

    last: dict[str, float] = {}
    for line in lines:
        last |= line
    rows = [("steps", f"{last['step']:.0f}"), ("training time", f"{last['seconds'] / 60:.1f} min")]
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
    rows += [("skipped updates (non-finite gradient)", f"{last['skipped']:.0f}"), ("torch", torch.__version__)]
    return f"<table>{''.join(f'<tr><th>{name}</th><td>{value}</td></tr>' for name, value in rows)}</table>"


def sample_grids(paths: Sequence[Path]) -> str:
    """Return the last sample grid, and the earlier ones folded away."""
    if not paths:
        return "<p>The run has no sample grid.</p>"
    last, *earlier = (f"<p>{escape(path.stem)}</p>{html_parts.image(path)}" for path in reversed(paths))
    return last + (f"<details><summary>Over training</summary>{''.join(earlier)}</details>" if earlier else "")
