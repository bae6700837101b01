"""Write Markdown: whatever a name contains, it stays text in its cell."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([|`*\[\]\\])")


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table. Cells are Markdown: pass what a user named through `text` or `code`."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def text(value: object) -> str:
    """Return ``value`` so that it shows as it is, on one line: no markup, no HTML, no end of a table's cell."""
    one_line = " ".join(str(value).split())
    return _SPECIAL.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code(value: object) -> str:
    """Return ``value`` as code, on one line, also in a table."""
    one_line = " ".join(str(value).split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", one_line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{one_line}{space}{fence}"
