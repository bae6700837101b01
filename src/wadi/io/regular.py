"""Open regular files only: a FIFO, a socket or a device in the place of a file would block or never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from wadi.errors import WadiError

KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO (named pipe)"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def open_regular(path: str | Path, limit: int | None = None, what: str = "File") -> BinaryIO:
    """Open ``path`` for reading bytes; never blocks.

    Args:
        what: name of the file's contents at the start of a message, such as ``Prompts file``.
    Raises:
        WadiError: if the file is missing, is not a regular file (symlinks are followed), or cannot be opened.
    """
    try:
        _refuse_special(os.stat(path).st_mode, path, what)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:  # the file may have been exchanged between the two calls
            _refuse_special(os.fstat(descriptor).st_mode, path, what)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        raise WadiError(f"{what} {_short(path)} does not exist. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise WadiError(f"{what} {_short(path)} cannot be read: {reason}. Give a readable file.") from error


def read_bytes(path: str | Path, limit: int, what: str = "File") -> bytes:
    """Return the contents of a regular file of at most ``limit`` bytes.

    Raises:
        WadiError: see `open_regular`; or if the file is larger.
    """
    with open_regular(path, None, what) as stream:
        try:
            data = stream.read(limit + 1)
            size = max(os.fstat(stream.fileno()).st_size, len(data))
        except OSError as error:
            raise WadiError(f"{what} {_short(path)} cannot be read: {error.strerror}. Give a readable file.") from error
    if len(data) > limit:
        raise WadiError(
            f"{what} {_short(path)} has {size:,} bytes. At most {limit:,} are read: check that it is the right file."
        )
    return data


def _refuse_special(mode: int, path: str | Path, what: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in KINDS if test(mode)), "not a regular file")
        raise WadiError(f"{what} {_short(path)} is {kind}. Give a regular file.")


def _short(path: str | Path) -> str:
    """The path in quotes, its middle left out if it is very long."""
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}")
