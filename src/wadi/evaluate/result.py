"""Result files: numbers with their spread, every choice they rest on, and the hash that says which may be compared.

``protocol`` holds what two generators must share: prompts, seeds, sizes, reference, number of pictures, and of each metric its
network (with a digest of the weights), filters and parameters. ``protocol_hash`` is the SHA-256 of it as canonical JSON (sorted
names, no spaces, UTF-8). What is being measured stands in each row's ``generator``, versions and machine in ``environment``;
neither enters the hash.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.evaluate.drawn import differences
from wadi.io import markdown
from wadi.io.files import write_whole
from wadi.io.metric_names import SPEED_LABELS, metric_label
from wadi.io.outputs import check_writable
from wadi.io.records import Count, Finite, Record, read_json
from wadi.io.records import asdict as asdict_of
from wadi.io.versions import installed_versions

FORMAT = 1
LIBRARIES = ("wadi-onestep", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@dataclass(frozen=True)
class Number:
    """One measured number.

    Attributes:
        std: standard deviation if the images were generated again from other seeds, with the same prompts and reference;
            None = not computed. In older results, whose protocol has ``bootstrap``: over bootstrap resamples, of a KID over
            its subsets.
        low, high: 95 % interval.
    """

    value: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one set of pictures.

    Attributes:
        generator: what drew them: digests of weights, steps, guidance, ...; of a folder what it tells.
        images: how many there were.
        metrics: by name.
        speed: of the generator on this machine; None = not measured.
    """

    name: str
    generator: dict[str, Any]
    images: int
    metrics: dict[str, Number]
    speed: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """Rows that were measured alike."""

    protocol: dict[str, Any]
    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def hash(self) -> str:
        """The protocol hash."""
        return protocol_hash(self.protocol)

    def save(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all."""
        content = {
            "format": FORMAT, "protocol_hash": self.hash, "command": self.command,
            "rows": [asdict(row) for row in self.rows], "protocol": self.protocol, "environment": self.environment,
        }  # fmt: skip
        write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def canonical(values: Any) -> bytes:
    """JSON in the one form that is hashed."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def protocol_hash(protocol: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a protocol's settings."""
    return hashlib.sha256(canonical(protocol)).hexdigest()


class WrittenNumber(Record):
    """A `Number` in a result file."""

    value: Finite
    std: Finite | None = None
    low: Finite | None = None
    high: Finite | None = None


class WrittenRow(Record):
    """A `Row` in a result file."""

    name: str
    generator: dict[str, Any]
    images: Count
    metrics: dict[str, WrittenNumber]
    speed: dict[str, Finite | str | None] | None = None


class Written(Record):
    """A result file."""

    format: int
    protocol_hash: str
    rows: list[WrittenRow]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    command: str


def read_result(path: str | Path) -> Result:
    """What `Result.save` wrote.

    Raises:
        WadiError: if the file is none, or its settings were changed after the hash was taken.
    """
    remedy = "It must be a file that `wadi eval --out` wrote."
    found: Written = read_json(path, Written, "Result", remedy=remedy)
    if found.format != FORMAT:
        raise WadiError(f"Result {str(path)!r} is of format {found.format}. Expected {FORMAT}: measure again.")
    rows = [
        Row(row.name, row.generator, row.images, {name: Number(**asdict_of(n)) for name, n in row.metrics.items()}, row.speed)
        for row in found.rows
    ]
    result = Result(found.protocol, rows, found.environment, found.command)
    if found.protocol_hash != result.hash:
        raise WadiError(
            f"Result {str(path)!r} was changed: its settings do not give its protocol hash. Expected it as written."
        )
    return result


def compare(first: str | Path, second: str | Path) -> str:
    """Both results' rows in one table, but for speed, which is the machine's.

    Raises:
        WadiError: if they were not measured alike, naming each setting that differs.
    """
    one, two = read_result(first), read_result(second)
    if one.hash != two.hash:
        told = "; ".join(differences(one.protocol, two.protocol))
        raise WadiError(
            f"{str(first)!r} and {str(second)!r} were not measured alike: {told}. Expected equal protocol hashes, or the "
            "numbers say nothing about each other: measure one of them again."
        )
    return table([replace(row, speed=None) for row in (*one.rows, *two.rows)])


SPEED_FORMATS = {
    "images_per_second": "{:.1f}", "latency_p50_ms": "{:.0f}", "latency_p95_ms": "{:.0f}", "peak_memory_mib": "{:.0f}",
    "parameters": "{:,}", "evaluations": "{:g}",
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per row, a column per metric that any row has, ``value ± std``; speed, where measured, in another."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    cells = [[told(row.metrics[name]) if name in row.metrics else "" for name in names] for row in rows]
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
    """The table, its command and its machine: between the markers of a Markdown file, or as a new one.

    Raises:
        WadiError: if the file is there and has no such markers.
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


def told(number: Number) -> str:
    """``5.90 ± 0.11``: as many digits as the spread has sense."""
    if number.std is None:
        return f"{number.value:.4g}"
    digits = 3 if number.std == 0 else max(0, 1 - _exponent(number.std))
    return f"{number.value:.{digits}f} ± {number.std:.{digits}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def environment(device: Any = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Versions and machine that a result was made with."""
    return {
        "versions": installed_versions(LIBRARIES),
        "python": platform.python_version(),
        "machine": _processor(),
        "device": str(device),
        "threads": threads,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
