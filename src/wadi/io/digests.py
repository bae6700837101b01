"""Digests of large files, computed once: kept in the user's cache by path, size, times and inode."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from wadi.errors import WadiError
from wadi.io.files import sha256, write_whole
from wadi.io.progress import progress
from wadi.io.records import Record, read_json

KEPT_FROM = 2**20  # bytes; smaller files are read again
SETTLED = 2.0  # seconds since the last change after which a file's times tell a later change
_known: dict[Path, tuple[list[int], str]] = {}  # in this process, also where the cache cannot be written


class Kept(Record):
    """What the cache knows of a file: its digest, and the state of the file that has it."""

    state: list[int]
    digest: str


def cache_folder() -> Path:
    """Return where digests, features and downloads are kept.

    It is ``$WADI_CACHE``, else ``$XDG_CACHE_HOME/wadi``, else ``~/.cache/wadi``.

    Raises:
        WadiError: if none of the three exists, because this user has no home folder.
    """
    if chosen := os.environ.get("WADI_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wadi"
    except RuntimeError as error:  # no HOME, and no entry for this user
        raise WadiError("This user has no home folder to cache files in. Set WADI_CACHE to a folder.") from error


def digests(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, from the cache where the file has not changed since; with a bar for large ones.

    Raises:
        WadiError: if a file cannot be read.
    """
    found = {file: _kept(file) for file in files}
    left = [file for file, digest in found.items() if digest is None]
    size = sum(file.stat().st_size for file in left)
    with progress("MiB of weights checked", max(1, size >> 20), quiet=size < 2**30) as bar:
        for file in left:
            found[file] = _computed(file)
            bar.advance(by=file.stat().st_size >> 20)
    return [str(found[file]) for file in files]


def _state(file: Path) -> list[int]:
    """What changes whenever the content of a file does."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _place(file: Path) -> Path | None:
    name = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()
    try:
        return cache_folder() / "digests" / f"{name[:32]}.json"
    except WadiError:
        return None


def _kept(file: Path) -> str | None:
    """The digest in the cache, if it has one of this very file."""
    if file in _known and file.is_file() and _known[file][0] == _state(file):
        return _known[file][1]
    place = _place(file)
    if place is None or not file.is_file() or file.stat().st_size < KEPT_FROM or not place.is_file():
        return None
    try:
        kept: Kept = read_json(place, Kept, "Digest")
    except WadiError:  # damaged: computed again
        return None
    return kept.digest if kept.state == _state(file) else None


def _computed(file: Path) -> str:
    """The digest of a file, which is put into the cache if that can be written."""
    before = _state(file) if file.is_file() else []
    digest, place = sha256(file), _place(file)
    # Within the clock's resolution a second change leaves the times as they are.
    settled = before and _state(file) == before and time.time() - max(before[1:3]) / 1e9 > SETTLED
    if settled and before[0] >= KEPT_FROM:
        _known[file] = before, digest
        if place is not None:
            with suppress(WadiError):  # a cache that cannot be written costs time, nothing else
                write_whole(place, json.dumps({"state": before, "digest": digest}).encode())
    return digest
