"""Results as Markdown tables: metrics with their spread, and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wadi.errors import WadiError
from wadi.evaluate.generated import differences
from wadi.evaluate.result import Number, Result, Row, read_result
from wadi.io import markdown
from wadi.io.files import write_whole
from wadi.io.metric_names import SPEED_LABELS, metric_label
from wadi.io.outputs import check_writable

SPEED_FORMATS = {
    "images_per_second": "{:.1f}", "latency_p50_ms": "{:.0f}", "latency_p95_ms": "{:.0f}", "peak_memory_mib": "{:.0f}",
    "parameters": "{:,}", "evaluations": "{:g}",
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return Markdown with a line for each row and a column for each metric, as ``value ± std``.

    Speed, where it was measured, is in a second table.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    cells = [[format_number(row.metrics[name]) if name in row.metrics else "" for name in names] for row in rows]
    counted = [[str(row.images), *line] for row, line in zip(rows, cells, strict=True)]
    quality = _markdown(["images", *map(metric_label, names)], rows, counted)
    timed = [row for row in rows if row.speed is not None]
    if not timed:
        return quality
    quick = [[_speed(row, name) for name in SPEED_LABELS] for row in timed]
    return f"{quality}\n\n{_markdown(list(SPEED_LABELS.values()), timed, quick)}"


def _markdown(head: Sequence[str], rows: Sequence[Row], cells: Sequence[Sequence[str]]) -> str:
    return markdown.table(
        ["", *map(markdown.escape, head)], [[markdown.escape(row.name), *line] for row, line in zip(rows, cells, strict=True)]
    )


def _speed(row: Row, name: str) -> str:
    value = (row.speed or {}).get(name)
    return "" if value is None else SPEED_FORMATS[name].format(value)


BEGIN, END = "<!-- wadi eval: begin -->", "<!-- wadi eval: end -->"


def write_table(path: Path, result: Result) -> None:
    """Write the table, its command and its machine between the markers of a Markdown file, or into a new file.

    Raises:
        WadiError: if the file exists without such markers.
    """
    place = result.environment
    libraries = ", ".join(f"{name} {number}" for name, number in place.get("versions", {}).items() if number)
    machine = f"{place.get('machine')}, {place.get('threads')} thread(s) of torch, {place.get('device')}"
    content = (
        f"{table(result.rows)}\n\nEvery row: {markdown.code_span(result.command)}\n\n"
        f"Protocol `{result.hash}`. {machine}; {libraries}."
    )
    if path.exists():
        markdown.write_between_markers(path, BEGIN, END, content)
    else:
        write_whole(path, f"{BEGIN}\n{content}\n{END}\n".encode())


def check_table(path: Path) -> None:
    """Check, before the work whose table goes there, that `write_table` can write ``path``.

    Raises:
        WadiError: if the file exists without the markers, cannot be read, or its folder cannot be written.
    """
    check_writable(path)
    if path.exists():
        markdown.split_at_markers(path, BEGIN, END)


def format_number(number: Number) -> str:
    """Return ``5.90 ± 0.11``, with two significant digits of the spread."""
    if number.std is None:
        return f"{number.value:.4g}"
    digits = 3 if number.std == 0 else max(0, 1 - _exponent(number.std))
    return f"{number.value:.{digits}f} ± {number.std:.{digits}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def comparison_table(first: str | Path, second: str | Path) -> str:
    """Return one table with the rows of both results, without speed, which depends on the machine.

    Raises:
        WadiError: if their settings differ; the message names each difference.
    """
    one, two = read_result(first), read_result(second)
    if one.hash != two.hash:
        changes = "; ".join(differences(one.protocol, two.protocol))
        raise WadiError(
            f"{str(first)!r} and {str(second)!r} have different settings, so they cannot be compared: {changes}. Measure one "
            "of them again with the settings of the other."
        )
    return table([replace(row, speed=None) for row in (*one.rows, *two.rows)])
