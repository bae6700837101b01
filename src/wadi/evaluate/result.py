"""Result files: metrics with their spread, every setting they depend on, and a hash that says which results can be compared.

``protocol`` contains what two generators must share: prompts, seeds, sizes, reference, number of images, and for each metric
its network (with a digest of the weights), filters and parameters. ``protocol_hash`` is the SHA-256 of it as canonical JSON
(sorted names, no spaces, UTF-8). Each row has the measured ``generator``, and ``environment`` has versions and machine;
neither is part of the hash.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.records import Count, Finite, Record, read_json
from wadi.io.records import asdict as asdict_of
from wadi.io.versions import installed_versions

FORMAT = 1
LIBRARIES = ("wadi-onestep", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@dataclass(frozen=True)
class Number:
    """One measured value.

    Attributes:
        std: standard deviation if the images were generated again from other seeds, with the same prompts and reference; None
            = not computed. In older results, whose protocol has ``bootstrap``: over bootstrap resamples, and for a KID over
            its subsets.
        low, high: 95 % interval.
    """

    value: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """The metrics of one set of images.

    Attributes:
        generator: what generated them: digests of weights, steps, guidance, ...; for a folder, what its ``pictures.json``
            says.
        images: how many there are.
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
    """Rows that were measured with the same settings."""

    protocol: dict[str, Any]
    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def hash(self) -> str:
        """The protocol hash."""
        return protocol_hash(self.protocol)

    def save(self, path: Path) -> None:
        """Write the result as JSON, completely or not at all."""
        content = {
            "format": FORMAT, "protocol_hash": self.hash, "command": self.command,
            "rows": [asdict(row) for row in self.rows], "protocol": self.protocol, "environment": self.environment,
        }  # fmt: skip
        write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def canonical(values: Any) -> bytes:
    """Return the JSON that is hashed."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def protocol_hash(protocol: dict[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a protocol's settings."""
    return hashlib.sha256(canonical(protocol)).hexdigest()


class NumberRecord(Record):
    """A `Number` in a result file."""

    value: Finite
    std: Finite | None = None
    low: Finite | None = None
    high: Finite | None = None


class RowRecord(Record):
    """A `Row` in a result file."""

    name: str
    generator: dict[str, Any]
    images: Count
    metrics: dict[str, NumberRecord]
    speed: dict[str, Finite | str | None] | None = None


class ResultRecord(Record):
    """A result file."""

    format: int
    protocol_hash: str
    rows: list[RowRecord]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    command: str


def read_result(path: str | Path) -> Result:
    """Read what `Result.save` wrote.

    Raises:
        WadiError: if the file is not a result, or its settings were changed after the hash was computed.
    """
    remedy = "It must be a file that `wadi eval --out` wrote."
    written_result: ResultRecord = read_json(path, ResultRecord, "Result", remedy=remedy)
    if written_result.format != FORMAT:
        raise WadiError(f"Result {str(path)!r} has format {written_result.format}, not {FORMAT}. Measure again.")
    rows = [
        Row(row.name, row.generator, row.images, {name: Number(**asdict_of(n)) for name, n in row.metrics.items()}, row.speed)
        for row in written_result.rows
    ]
    result = Result(written_result.protocol, rows, written_result.environment, written_result.command)
    if written_result.protocol_hash != result.hash:
        raise WadiError(
            f"Result {str(path)!r} was changed: its settings do not match its protocol hash. Use the file as it was written."
        )
    return result


def environment(device: Any = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Return the versions and the machine that a result was made with."""
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
