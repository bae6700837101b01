"""A folder of generated images with a list of how each was generated. The same command continues where it was stopped.

``images.jsonl`` has one line per image: file, prompt, seed, settings, and the SHA-256 digest of the file. A line is added
before its image is written. If a file has several lines, the last one counts. An image is finished if its file has the digest
in its line: an unfinished image is generated again, and an image that somebody has changed is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.io.files import sha256, write_whole
from wadi.io.outputs import write_error
from wadi.io.records import JSON_BYTES, Count, Digest, Record, as_json, flatten, read_json_lines
from wadi.io.regular import read_bytes

MANIFEST = "images.jsonl"


@dataclass(frozen=True)
class PlannedImage:
    """An image to generate: the name of its file, its prompt and its seed."""

    file: str
    prompt: str
    seed: int


class Line(Record):
    """A line of ``images.jsonl``."""

    file: str
    prompt: str
    seed: Count
    sha256: Digest
    settings: dict[str, Any]


def missing_images(
    folder: Path, images: Sequence[PlannedImage], settings: Mapping[str, Any], overwrite: bool = False
) -> list[int]:
    """Return the indices of the ``images`` that are not yet generated.

    Args:
        settings: everything else that affects the images, as JSON values.
        overwrite: generate existing files that differ again, instead of raising an error.
    Raises:
        WadiError: if an existing file was generated with other settings, or not by this package, unless ``overwrite``; or if
            ``images.jsonl`` is damaged.
    """
    known, settings = _read(folder / MANIFEST), as_json(dict(settings))
    rows = []
    for index, image in enumerate(images):
        path = folder / image.file
        if not path.exists():
            rows.append(index)
        elif reason := _difference(path, image, settings, known.get(image.file)):
            if not overwrite:
                raise WadiError(
                    f"{str(path)!r} already exists, and {reason}. Choose another folder with --out, or replace the image with "
                    "--overwrite."
                )
            rows.append(index)
    return rows


def write_images(folder: Path, images: Sequence[PlannedImage], files: Sequence[bytes], settings: Mapping[str, Any]) -> None:
    """Write ``images`` with the contents ``files``, and add their lines to ``images.jsonl``.

    Raises:
        WadiError: if the folder cannot be written or the disk is full.
    """
    lines = [
        json.dumps({**asdict(image), "sha256": hashlib.sha256(data).hexdigest(), "settings": dict(settings)})
        for image, data in zip(images, files, strict=True)
    ]
    _append(folder / MANIFEST, "".join(f"{line}\n" for line in lines).encode())
    for image, data in zip(images, files, strict=True):
        write_whole(folder / image.file, data)


def _difference(path: Path, image: PlannedImage, settings: Mapping[str, Any], line: Line | None) -> str:
    """Return how the file at ``path`` differs from ``image``; empty if it does not."""
    if line is None:
        return f"{MANIFEST} does not list it"
    if (line.prompt, line.seed) != (image.prompt, image.seed):
        return f"has another prompt or seed: {line.prompt[:80]!r} and {line.seed}"
    old, new = flatten(line.settings), flatten(dict(settings))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        differences = ", ".join(f"{name} {old.get(name)!r} instead of {new.get(name)!r}" for name in changed[:3])
        return f"was generated with other settings: {differences}"
    return "" if line.sha256 == sha256(path) else "has changed since it was written"


def _read(path: Path) -> dict[str, Line]:
    """Return the last line for each file. An unfinished line at the end, left by a killed process, is removed."""
    if not path.exists():
        return {}
    data = read_bytes(path, JSON_BYTES, "Image list")
    finished = data[: data.rfind(b"\n") + 1]
    if finished != data and (finished or data.startswith(b'{"file": ')):
        write_whole(path, finished)
    lines: list[Line] = read_json_lines(path, Line, "Image list")
    return {line.file: line for line in lines}


def _append(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise write_error(path, error) from error
