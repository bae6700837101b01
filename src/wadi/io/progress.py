"""Progress on the terminal: a bar, or a line every few seconds if stderr is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 15.0  # seconds between lines without a terminal
console = Console(stderr=True, highlight=False)


class Bar:
    """The progress of one task. `advance` also takes numbers to show next to the bar."""

    def __init__(self, title: str, total: int, done: int, bar: Progress | None, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.bar, self.quiet = title, total, done, bar, quiet
        self.start, self.last, self.first = time.monotonic(), time.monotonic(), done
        self.task = bar.add_task(title, total=total, completed=done, metrics="") if bar else None

    def advance(self, metrics: Mapping[str, float | str] | None = None, by: int = 1) -> None:
        """Count ``by`` more. ``metrics`` are shown as ``name value``."""
        self.done += by
        text = "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in (metrics or {}).items())
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, metrics=text)
        elif not self.quiet and (time.monotonic() - self.last > LINE_EVERY or self.done == self.total):
            self.last = time.monotonic()
            elapsed = self.last - self.start
            left = elapsed / max(1, self.done - self.first) * (self.total - self.done)
            console.print(
                f"{self.title} {self.done}/{self.total}  {text}  {elapsed:.0f} s, {left:.0f} s left",
                soft_wrap=True,
            )


@contextmanager
def progress(title: str, total: int, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """Show a bar from ``done`` to ``total``. ``quiet`` shows nothing (for all processes but the first)."""
    if quiet or not console.is_terminal:
        yield Bar(title, total, done, None, quiet)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield Bar(title, total, done, bars)
