"""Files and folders written whole or not at all: a temporary name beside the target, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` when the block ends and vanishes if it fails.

    Raises:
        WadiError: if the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        if path.exists():
            # A folder cannot be replaced in one call: the old one steps aside and goes last.
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk through an exception class of its own
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise unwritable(path, error) from error
        raise


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
