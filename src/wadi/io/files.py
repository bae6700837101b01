"""Write files and folders completely or not at all, and never delete a file that we did not write.

`write_whole`, `whole_file` and `whole_folder` fill a temporary file or folder next to the target, flush it to disk, then rename
it. `wadi.io.temporary` makes the temporary names.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from wadi.io.outputs import check_kind, check_replaceable, files_in, write_error
from wadi.io.regular import exists, open_regular
from wadi.io.temporary import create_file, create_folder, locked, spare_path, sweep_files, sweep_folders


def sha256(path: Path) -> str:
    """Return the hex digest of a regular file's content.

    Raises:
        WadiError: if it cannot be read; see `wadi.io.regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file ``path`` by ``data``. If that fails, the old file is still there.

    Raises:
        WadiError: see `whole_file`.
    """
    with whole_file(path) as stream:
        stream.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream to write. It becomes the file ``path`` when the block ends, and is removed if the block fails.

    Raises:
        WadiError: if the folder cannot be written, the disk is full, or ``path`` is not a regular file.
    """
    descriptor, temporary = -1, None
    try:
        check_kind(path, folder=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_files(path.parent)
        descriptor, temporary = create_file(path)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if os.name == "nt":  # Windows cannot rename an open file; elsewhere the lock is held to the end
                stream.close()
            os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) or (isinstance(error, ValueError) and temporary is None):  # NUL bytes in the path
            raise write_error(path, error) from error
        raise


@contextmanager
def whole_folder(path: Path, known: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder to fill. It becomes ``path`` when the block ends, and is removed if the block fails.

    An existing folder is replaced if each of its files is written again or matches ``known``. Other files are never deleted.
    If two processes write the same folder, the folder of one of them stays, complete.

    Args:
        known: patterns of relative paths (``*.png``) that an earlier result may contain and this one may not. Call
            `wadi.io.outputs.check_replaceable` with all names before long work: here the check comes last.
    Raises:
        WadiError: if the folder contains a file that we did not write, the disk is full, or the folder cannot be written.
    """
    lock, temporary, known = -1, None, tuple(known)
    try:
        try:
            path = Path(os.path.realpath(path))  # a link to a folder stays; its folder is replaced
        except ValueError as error:  # a NUL character
            raise write_error(path, error) from error
        check_kind(path, folder=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent) as alone:
            sweep_folders(path.parent, [glob.escape(path.name)], alone)
        temporary, lock = create_folder(path)
        yield temporary
        _flush(temporary)
        with locked(path.parent) as alone:
            sweep_folders(path.parent, [glob.escape(path.name)], alone)
            check_replaceable(path, (*known, *map(glob.escape, files_in(temporary))))
            _swap(temporary, path)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk through an exception class of its own
        path_error = isinstance(error, ValueError) and temporary is None
        if isinstance(error, OSError) or path_error or type(error).__name__ == "SafetensorError":
            raise write_error(path, error) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def remove_folder(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a killed process leaves no half of it under its name."""
    with locked(path.parent):
        doomed = spare_path(path, "doomed")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    """Flush the files of ``folder`` to disk, with the permissions of the umask (libraries write them for the owner only)."""
    readable = stat.S_IMODE(folder.stat().st_mode) & 0o666  # a new folder has 777 without the umask
    for name in files_in(folder):
        file = folder / name
        if file.is_symlink():
            continue
        with suppress(PermissionError):
            file.chmod(stat.S_IMODE(file.stat().st_mode) | readable)
        with open_regular(file) as stream:
            os.fsync(stream.fileno())


def _swap(new: Path, path: Path) -> None:
    """Put the folder ``new`` in the place of ``path``.

    No single system call replaces a folder, so the old one is renamed first and removed last.
    """
    if not exists(path):
        os.replace(new, path)
        return
    old = spare_path(path, "old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
