"""Temporary files and folders: their names, their locks, and what killed processes left behind.

A result is first written under a temporary name next to its target, such as ``.run.<random>.tmp``. The name is random and newly
created (never through a symbolic link). The file or folder is locked as long as its process lives, so that `sweep` can tell
which ones were left by killed processes.
"""

from __future__ import annotations

import fnmatch
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wadi.io.regular import exists, is_dir

PATIENCE = 10.0  # seconds to wait for a lock
_NAME_BYTES = 180  # longest target name inside a temporary name: file systems allow 255 bytes in all

# `.run.<random>.tmp`, `.run.<random>.old`, `.run.<random>.doomed`; earlier versions put a process number there, or nothing
_LEFTOVER = re.compile(r"\.(?P<name>.+?)\.(?:[0-9a-f]+\.(?P<end>tmp|old)|(?:[0-9a-f]+\.)?doomed)")
_swept: set[str] = set()  # folders in which this process has already looked for leftover files


def spare_path(path: Path, end: str) -> Path:
    """Return a new path next to ``path`` that nobody can guess: ``.NAME.<random>.END``."""
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.{end}")


def _stem(path: Path) -> str:
    """Return the name of ``path`` to use in temporary names: a short one if its own would be too long."""
    return path.name if len(os.fsencode(path.name)) <= _NAME_BYTES else "long-name"


def create_file(path: Path) -> tuple[int, Path]:
    """Create a locked temporary file for ``path``, with the permissions of the umask. Return its descriptor and path."""
    while True:
        temporary = spare_path(path, "wadi.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if _lock_new(descriptor, temporary):
            return descriptor, temporary


def create_folder(path: Path) -> tuple[Path, int]:
    """Create a locked temporary folder for ``path``. Return its path and the descriptor that holds the lock, or -1."""
    while True:
        temporary = spare_path(path, "tmp")
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as a leftover before it was locked
            continue
        except PermissionError:  # Windows cannot open folders
            return temporary, -1
        if _lock_new(descriptor, temporary):
            return temporary, descriptor


def _lock_new(descriptor: int, path: Path) -> bool:
    """Lock a file or folder that was just created. Return False if another process removed it as a leftover meanwhile."""
    _flock(descriptor, wait=True)
    if exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return True
    os.close(descriptor)
    return False


def _flock(descriptor: int, wait: bool) -> bool:
    """Lock an open file. Return False if another process holds the lock, or if the system has no locks.

    Args:
        wait: wait up to `PATIENCE` seconds. We hold locks briefly, but others may not (``flock FOLDER wadi ...``).
    """
    try:
        import fcntl
    except ImportError:
        return False
    end = time.monotonic() + (PATIENCE if wait else 0)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)
        except OSError:  # a network file system without locks
            return False
        else:
            return True


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock ``folder`` within the block: no other process renames anything in it. Yield False if it cannot be locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        yield False
        return
    try:
        yield _flock(descriptor, wait=True)
    finally:
        os.close(descriptor)


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Yield whether no living process holds ``path``, a temporary file or folder.

    Remove it within the block: a process that has just created it then waits for the lock, and sees that it is gone.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        yield False
        return
    try:
        yield _flock(descriptor, wait=False)
    finally:
        os.close(descriptor)


def sweep(folder: Path, *names: str) -> None:
    """Remove temporary folders that killed processes left in ``folder``.

    A folder that was renamed to make room for a replacement that never came is renamed back: it is the only copy.

    Args:
        names: names of the target folders; may be patterns (``step-*``).
    """
    if is_dir(folder):
        with locked(folder) as alone:
            sweep_folders(folder, names, alone)


def sweep_folders(folder: Path, names: Iterable[str], alone: bool) -> None:
    """Do the work of `sweep`.

    Args:
        alone: whether this process has locked ``folder``. Otherwise only abandoned ``.tmp`` folders are removed.
    """
    with os.scandir(folder) as entries:
        leftovers = [(entry.name, match) for entry in entries if (match := _LEFTOVER.fullmatch(entry.name))]
    for leftover, match in sorted(leftovers):
        path, target = folder / leftover, folder / match["name"]
        if not any(fnmatch.fnmatchcase(match["name"], name) for name in names) or path.is_symlink() or not path.is_dir():
            continue
        if match["end"] == "tmp":
            with _abandoned(path) as abandoned:
                if abandoned:
                    shutil.rmtree(path, ignore_errors=True)
        elif not alone:  # another process, which has the lock, may be renaming it
            continue
        elif match["end"] == "old" and not exists(target):
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def sweep_files(folder: Path) -> None:
    """Remove temporary files that killed processes left in ``folder``. Done once per folder: it may contain many files."""
    if str(folder) in _swept:
        return
    _swept.add(str(folder))
    for leftover in folder.glob(".*.wadi.tmp"):
        if leftover.is_file():
            with _abandoned(leftover) as abandoned, suppress(OSError):
                if abandoned:
                    leftover.unlink()
