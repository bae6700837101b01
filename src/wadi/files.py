"""Files and folders written whole or not at all: a temporary name beside the target, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wadi.errors import WadiError


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; on any failure what was there before is still there.

    Raises:
        WadiError: if the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # it may never have come to be, or its folder may be a file
            temporary.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` when the block ends and vanishes if it fails.

    Raises:
        WadiError: if the disk is full or the place cannot be written.
    """
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, "a file of that name is in the way")
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        if path.exists():
            # A folder cannot be replaced in one call: the old one steps aside and goes last.
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk through an exception class of its own
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise unwritable(path, error) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def unwritable(path: Path, error: BaseException) -> WadiError:
    """The error for a path that could not be written, with the system's own reason."""
    reason = getattr(error, "strerror", None) or str(error)
    return WadiError(
        f"Cannot write {str(path)!r}: {reason}. Expected a writable folder with free space; what was saved before is "
        "untouched. Free some space or choose another folder, then run the same command again."
    )


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
