"""Write an export: its files, then what its own reader makes of them, then its card. Completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.exports import FORMATS
from wadi.exports.card import CARD, IMAGES, card
from wadi.exports.runtime_folder import Precision
from wadi.exports.source import Source
from wadi.exports.written import Difference, Written, difference
from wadi.io.files import whole_folder
from wadi.io.grids import compose_grid, encode_png, enlargement
from wadi.io.imports import imported
from wadi.io.outputs import check_out

RECORD = "export.json"


@dataclass(frozen=True)
class Settings:
    """Settings of single formats.

    Attributes:
        rank: of a LoRA; None = as the student was trained, or `wadi.exports.lora.RANK`.
        precision: of the weights of ONNX and OpenVINO files. The other formats have `Source.dtype`.
    """

    rank: int | None = None
    precision: Precision = "float32"


@dataclass(frozen=True)
class Exported:
    """A finished export: one line about it, and its difference to the student."""

    summary: str
    check: Difference


def export(source: Source, to: str, out: Path, settings: Settings | None = None) -> Exported:
    """Write the student ``source`` in the format ``to`` into the new folder ``out``, and read it back.

    Raises:
        WadiError: if there is no such format, the format cannot hold the student (the message names one that can), something
            cannot be loaded, or ``out`` exists or cannot be written.
    """
    writer = _writer(to)
    check_out(out)
    with whole_folder(out) as folder:
        written = writer(source, folder, settings or Settings())
        images = written.read()
        check = difference(written.reference, images)
        prompts, _ = source.requests()
        grid = compose_grid([written.reference, images], ["student", "export"], prompts, enlargement(images[0]))
        (folder / IMAGES).write_bytes(encode_png(grid))
        record = {"format": to, "base": source.base_name, "check": asdict(check), **written.data}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card(source, written, check), encoding="utf-8")
    return Exported(written.summary.replace("FOLDER", repr(str(out))), check)


def _writer(to: str) -> Callable[[Source, Path, Any], Written]:
    if to not in FORMATS:
        raise WadiError(f"--to is {to!r}. Choose one of {', '.join(FORMATS)}.")
    writer: Callable[[Source, Path, Any], Written] = imported(FORMATS[to])
    return writer
