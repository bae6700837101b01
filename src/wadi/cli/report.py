"""``wadi report``: write ``report.html`` of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi report``."""
    parser.add_argument("run", help="folder of the run")


def run(arguments: Arguments) -> int:
    """Write the report and print its path."""
    from wadi.distill.report.page import write_report

    print(write_report(Path(arguments.options.run)))
    return 0
