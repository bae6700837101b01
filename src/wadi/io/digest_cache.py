"""SHA-256 digests of large files, computed once and cached.

The cache entry of a file stores its size, modification and change times, and inode. If any of them changes, the digest is
computed again.
"""

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
from wadi.io.user_cache import cache_folder

SMALLEST_CACHED = 2**20  # bytes; reading a smaller file again is fast enough
SETTLE_SECONDS = 2.0  # a file changed more recently than this could change again without new times
_in_memory: dict[Path, tuple[list[int], str]] = {}  # for this process, and where the cache folder cannot be written


class CachedDigest(Record):
    """A cache entry: a file's digest, and the state (see `_file_state`) of the file that has it."""

    state: list[int]
    digest: str


def cached_sha256(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, from the cache if the file is unchanged. Large files show a progress bar.

    Raises:
        WadiError: if a file cannot be read.
    """
    digests = {file: _cached(file) for file in files}
    uncached = [file for file, digest in digests.items() if digest is None]
    size = sum(file.stat().st_size for file in uncached)
    with progress("MiB of weights checked", max(1, size >> 20), quiet=size < 2**30) as bar:
        for file in uncached:
            digests[file] = _compute(file)
            bar.advance(by=file.stat().st_size >> 20)
    return [str(digests[file]) for file in files]


def _file_state(file: Path) -> list[int]:
    """Return numbers of which at least one changes when the file's content changes."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _entry_path(file: Path) -> Path | None:
    name = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()
    try:
        return cache_folder() / "digests" / f"{name[:32]}.json"
    except WadiError:
        return None


def _cached(file: Path) -> str | None:
    """Return the cached digest of the file as it is now, or None."""
    if file in _in_memory and file.is_file() and _in_memory[file][0] == _file_state(file):
        return _in_memory[file][1]
    path = _entry_path(file)
    if path is None or not file.is_file() or file.stat().st_size < SMALLEST_CACHED or not path.is_file():
        return None
    try:
        entry: CachedDigest = read_json(path, CachedDigest, "Digest")
    except WadiError:  # a damaged entry: compute the digest again
        return None
    return entry.digest if entry.state == _file_state(file) else None


def _compute(file: Path) -> str:
    """Compute the digest of a file, and put it into the cache if the cache can be written."""
    before = _file_state(file) if file.is_file() else []
    digest, path = sha256(file), _entry_path(file)
    # Two changes within the clock's resolution leave the same times, so a file that has just changed is not cached.
    settled = before and _file_state(file) == before and time.time() - max(before[1:3]) / 1e9 > SETTLE_SECONDS
    if settled and before[0] >= SMALLEST_CACHED:
        _in_memory[file] = before, digest
        if path is not None:
            with suppress(WadiError):  # without a writable cache, the next run computes the digest again
                write_whole(path, json.dumps({"state": before, "digest": digest}).encode())
    return digest
