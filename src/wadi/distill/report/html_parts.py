"""Pieces of HTML. Every text is escaped: a file name or a setting never becomes markup."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from wadi.io.regular import read_bytes


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return a table; the first row is its header."""
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


def image(path: Path) -> str:
    """Return a PNG file as an image that is part of the page."""
    data = base64.b64encode(read_bytes(path, what="Image")).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def figure(content: str, caption: str) -> str:
    """Return ``content``, which is HTML already, with a caption under it."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(parts: Sequence[str]) -> str:
    """Return figures next to each other."""
    return f'<div class="figures">{"".join(parts)}</div>'
