"""Look at a run from its folder while it trains: state, warnings, last grid and curves, as HTML drawn once for all viewers.

The folder is only read. A run that is being continued, killed or removed at the same time gives a state, never a failure.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from wadi.distill import config_files, health
from wadi.distill.report import html_parts
from wadi.distill.report.curves import curves
from wadi.distill.report.page import summary
from wadi.distill.report.results import analysis, evaluations
from wadi.distill.run_folder import LOCK, is_running
from wadi.errors import WadiError
from wadi.io.records import Finite, is_json, parse_json
from wadi.io.regular import open_regular

POINTS = 600  # of a curve
CHEAP = 10  # the time between two drawings is this many times what the last one took
Line = dict[str, float]


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Attributes:
        state: 'starting', 'running', 'finished', 'stopped' or 'gone'.
        step: of the last statistics; 0 = none yet.
        steps: of the whole run; None = unknown.
        last: last value of each statistic.
        warnings: signs of trouble in the newest statistics, with advice.
        seconds_left: estimate from the mean time of a step; None unless running.
        problem: why the folder cannot be read; empty if it can.
    """

    state: str
    step: int = 0
    steps: int | None = None
    last: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds_left: float | None = None
    problem: str = ""


class Statistics:
    """The lines of a ``stats.jsonl``; `read` reads what was added since, and all of it again if the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._inode, self._end = -1, 0

    def read(self) -> list[Line]:
        """Return all lines so far. A last line that is half written is left for the next call.

        Raises:
            WadiError: if a line is damaged or has no step.
        """
        if not self.path.exists():
            self.lines, self._inode, self._end = [], -1, 0
            return self.lines
        with open_regular(self.path, what="Statistics") as stream:
            status = os.fstat(stream.fileno())
            if status.st_ino != self._inode or status.st_size < self._end:
                self.lines, self._inode, self._end = [], status.st_ino, 0
            stream.seek(self._end)
            added = stream.read()
        whole = added[: added.rfind(b"\n") + 1]
        lines = []
        for text in whole.split(b"\n"):
            if text.strip() and is_json(text):  # a killed run may have left half a line, which its continuation removes
                line = parse_json(text, dict[str, int | Finite], f"Statistics {self.path.name!r}")
                if "step" not in line:
                    raise WadiError(f"Statistics {self.path.name!r} have an entry without 'step'. Restore the file.")
                lines.append(line)
        self.lines = [*self.lines, *lines]
        self._end += len(whole)
        return self.lines


class LiveRun:
    """One run, for any number of viewers at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._statistics = Statistics(folder / "stats.jsonl")
        self._lock = threading.Lock()
        self._drawn: tuple[Any, str] = (None, "")
        self._next = 0.0

    def status(self) -> Status:
        """Return where the run is."""
        with self._lock:
            return self._status()

    def html(self) -> tuple[Status, str]:
        """Return the status, and the page of the run: state, warnings, summary, last grid and curves.

        While the run trains, curves are drawn again only every so often, so that watching does not slow the training down.
        """
        with self._lock:
            status = self._status()
            stamp = (status.state, status.step, _newest(self.folder / "samples"))
            before, html = self._drawn
            ended = before is None or before[0] != status.state
            if stamp != before and (ended or time.monotonic() >= self._next):
                begin = time.monotonic()
                html = self._draw(status)
                self._drawn = (stamp, html)
                self._next = begin + (CHEAP + 1) * (time.monotonic() - begin)
            return status, status_html(status, self.folder.name) + html

    def _status(self) -> Status:
        if not self.folder.is_dir():
            return Status("gone", problem="The folder of the run is gone. Its page continues when the folder is back.")
        try:
            lines = self._statistics.read()
            steps = config_files.read_settings(self.folder / "config.yaml").get("steps")
        except WadiError as error:
            return Status("stopped", problem=str(error))
        last: dict[str, float] = {}
        for line in lines[-1000:]:
            last |= line
        step, running = int(last.get("step", 0)), is_running(self.folder / LOCK)
        if running:
            state = "running" if lines else "starting"
        else:
            state = "finished" if steps and step >= steps else "stopped"
        left = None
        if state == "running" and steps and step and "seconds" in last:
            left = last["seconds"] / step * max(0, steps - step)
        return Status(state, step, steps, last, tuple(health.warnings(lines[-1], lines[:-1])) if lines else (), left)

    def _draw(self, status: Status) -> str:
        lines = self._statistics.lines
        if status.problem or not lines:
            return ""
        try:
            grid = _grid(self.folder / "samples")
            return f"{grid}<h3>Curves</h3>{curves(thinned(lines))}<h3>Summary</h3>{summary(lines)}"
        except WadiError as error:  # a file went away between two looks
            return f"<p>{escape(str(error))}</p>"


def status_html(status: Status, name: str) -> str:
    """Return the head of a run's page: name, state, progress and warnings."""
    total = f" of {status.steps:,}" if status.steps else ""
    left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
    share = min(1.0, status.step / status.steps) if status.steps else 0.0
    parts = [
        f'<p class="wadi-state wadi-{status.state}"><b>{escape(name)}</b> <span>{status.state}</span> '
        f"step {status.step:,}{total}{left}</p>",
        f'<div class="wadi-bar"><div style="width:{100 * share:.1f}%"></div></div>',
    ]
    if status.problem:
        parts.append(f'<p class="wadi-warning">{escape(status.problem)}</p>')
    parts += [f'<p class="wadi-warning">{escape(warning)}</p>' for warning in status.warnings]
    if status.state in ("running", "finished") and not status.warnings and not status.problem:
        parts.append('<p class="wadi-healthy">No sign of trouble in the statistics.</p>')
    return "".join(parts)


def results_html(folder: Path) -> str:
    """Return tables and figures of ``wadi eval``, ``wadi swap`` and ``wadi analyze`` in a run's folder; empty without any."""
    if not folder.is_dir():
        return '<p class="wadi-warning">The folder of the run is gone.</p>'
    try:
        return analysis(folder / "analysis") + evaluations(folder)
    except WadiError as error:
        return f'<p class="wadi-warning">{escape(str(error))}</p>'


def duration(seconds: float) -> str:
    """Return a time such as ``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def thinned(lines: Sequence[Line], most: int = POINTS) -> list[Line]:
    """Return at most ``most`` lines, evenly spaced, the last one always; lines with rare statistics are kept before others.

    Values of a grid (diversity, contrast) are in few lines, and would vanish from the curves.
    """
    every = max(1, -(-len(lines) // (most // 2)))
    rare = [i for i, line in enumerate(lines) if "diversity_ratio" in line or "student_direction_change" in line]
    rare = rare[:: max(1, -(-len(rare) // (most // 2)))]
    kept = sorted({*range(len(lines) - 1, -1, -every), *rare})
    return [lines[i] for i in kept]


def _grids(samples: Path) -> list[Path]:
    return sorted(samples.glob("step-*.png"))


def _newest(samples: Path) -> str:
    return max((path.name for path in _grids(samples)), default="")


def _grid(samples: Path) -> str:
    """Return the newest grid of a run as a figure."""
    grids = _grids(samples)
    if not grids:
        return ""
    step = int(re.sub(r"\D", "", grids[-1].stem) or 0)
    return f"<h3>Same noise, same prompts, at step {step:,}</h3>{html_parts.image(grids[-1])}"
