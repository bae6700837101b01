"""A folder of generated images that knows how each was made, so that the same command continues where it stopped.

``images.jsonl`` has a line for each image: file, prompt, seed, settings, and the SHA-256 digest of the file. Lines are added
before their images are written; of several lines for a file the last counts. An image is done if its file has the digest of its
line. So an image that was not finished is generated again, and one that somebody changed is not taken for ours.
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
from wadi.io.files import sha256, unwritable, write_whole
from wadi.io.records import JSON_BYTES, Count, Digest, Record, flatten, read_json_lines, written
from wadi.io.regular import read_bytes

MANIFEST = "images.jsonl"


@dataclass(frozen=True)
class Image:
    """An image of a folder: name of its file, and what it is generated from."""

    file: str
    prompt: str
    seed: int


class Line(Record):
    """A line of the manifest."""

    file: str
    prompt: str
    seed: Count
    sha256: Digest
    settings: dict[str, Any]


def missing(folder: Path, images: Sequence[Image], settings: Mapping[str, Any], overwrite: bool = False) -> list[int]:
    """Return the indices of those ``images`` that are still to be generated.

    Args:
        settings: everything that decides about the images besides prompt and seed, as JSON values.
        overwrite: generate anew what is there and differs.
    Raises:
        WadiError: if a file is there that was made otherwise, or not by this package, unless ``overwrite``; or if the manifest
            is damaged.
    """
    known, settings = _read(folder / MANIFEST), written(dict(settings))
    rows = []
    for index, image in enumerate(images):
        path = folder / image.file
        if not path.exists():
            rows.append(index)
        elif reason := _difference(path, image, settings, known.get(image.file)):
            if not overwrite:
                raise WadiError(
                    f"{str(path)!r} is there already, and {reason}. Choose another folder with --out, or replace the image "
                    "with --overwrite."
                )
            rows.append(index)
    return rows


def write(folder: Path, images: Sequence[Image], files: Sequence[bytes], settings: Mapping[str, Any]) -> None:
    """Write ``images`` with the content ``files``, and their lines of the manifest.

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


def _difference(path: Path, image: Image, settings: Mapping[str, Any], line: Line | None) -> str:
    """How the file at ``path`` differs from ``image``; empty if it is that image."""
    if line is None:
        return f"{MANIFEST} does not list it"
    if (line.prompt, line.seed) != (image.prompt, image.seed):
        return f"has another prompt or seed: {line.prompt[:80]!r} and {line.seed}"
    old, new = flatten(line.settings), flatten(dict(settings))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        listed = ", ".join(f"{name} {old.get(name)!r} instead of {new.get(name)!r}" for name in changed[:3])
        return f"was made with other settings: {listed}"
    return "" if line.sha256 == sha256(path) else "was changed since it was written"


def _read(path: Path) -> dict[str, Line]:
    """The last line of the manifest for each file; a last line that a killed process left unfinished is cut off."""
    if not path.exists():
        return {}
    data = read_bytes(path, JSON_BYTES, "Image list")
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data and (whole or data.startswith(b'{"file": ')):
        write_whole(path, whole)
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
        raise unwritable(path, error) from error
