"""What a person watching the terminal sees: a bar there, a line now and then where output goes to a file."""

from __future__ import annotations

import importlib
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

LINE_EVERY = 15.0  # seconds between lines when there is no terminal
console = Console(stderr=True, highlight=False)


class Bar:
    """Progress of one task; `advance` carries the figures shown beside it."""

    def __init__(self, title: str, total: int, done: int, bar: Progress | None, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.bar, self.quiet = title, total, done, bar, quiet
        self.start, self.last, self.first = time.monotonic(), time.monotonic(), done
        self.task = bar.add_task(title, total=total, completed=done, figures="") if bar else None

    def advance(self, figures: Mapping[str, float | str] | None = None, by: int = 1) -> None:
        """Count ``by`` more; ``figures`` are shown as ``name value``."""
        self.done += by
        text = "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in (figures or {}).items())
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, figures=text)
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
    """A bar from ``done`` to ``total``; ``quiet`` shows nothing (ranks other than the first)."""
    if quiet or not console.is_terminal:
        yield Bar(title, total, done, None, quiet)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield Bar(title, total, done, bars)


@contextmanager
def without_remarks(library: str) -> Iterator[None]:
    """Within the block ``library``, 'diffusers' or 'transformers', logs errors only."""
    logging = importlib.import_module(f"{library}.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
