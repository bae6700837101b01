"""Write Markdown tables and escaped text, and replace the text between the markers of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.regular import read_text

_SPECIAL = re.compile(r"([|`*\[\]\\])")


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table. Cells are Markdown: use `escape` or `code_span` for names that users chose."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def escape(value: object) -> str:
    """Return ``value`` on one line, escaped so that Markdown shows it unchanged, also in a table's cell."""
    one_line = " ".join(str(value).split())
    return _SPECIAL.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code_span(value: object) -> str:
    """Return ``value`` as code, on one line, also in a table."""
    one_line = " ".join(str(value).split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", one_line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{one_line}{space}{fence}"


def split_at_markers(page: Path, begin: str, end: str) -> tuple[str, str]:
    """Return the text of a Markdown file before the marker ``begin`` and after the marker ``end``.

    Raises:
        WadiError: if the file does not exist, cannot be read, or lacks one of the markers.
    """
    content = read_text(page, what="Markdown page") if page.is_file() else ""
    before, found_begin, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise WadiError(f"{str(page)!r} has no place for the table. Add the lines {begin!r} and {end!r} where it belongs.")
    return before, after


def write_between_markers(page: Path, begin: str, end: str, content: str) -> None:
    """Replace the text between two markers of a Markdown file. The markers stay; ``content`` gets lines of its own.

    Raises:
        WadiError: as `split_at_markers`, or if the file cannot be written.
    """
    before, after = split_at_markers(page, begin, end)
    write_whole(page, f"{before}{begin}\n{content}\n{end}{after}".encode())
