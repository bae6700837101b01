"""Read regular files only: a FIFO, a socket or a device in the place of a file would block or never end.

`read_bytes` and `read_text` read one. `regular` checks one for a library that opens the path itself. `exists`, `is_file` and
`is_dir` answer for any path, also for one that no file system allows (too long, NUL characters, lone surrogates), for which
``Path.exists`` raises.
"""

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


def exists(path: str | Path) -> bool:
    """Return whether there is something at ``path``."""
    return os.path.exists(path)


def is_file(path: str | Path) -> bool:
    """Return whether ``path`` is a regular file."""
    return os.path.isfile(path)


def is_dir(path: str | Path) -> bool:
    """Return whether ``path`` is a folder."""
    return os.path.isdir(path)


def open_regular(path: str | Path, limit: int | None = None, what: str = "File") -> BinaryIO:
    """Open ``path`` for reading bytes; never blocks.

    Args:
        limit: largest size in bytes.
        what: name of the file's contents at the start of a message, such as ``Prompts file``.
    Raises:
        WadiError: if the file is missing, is not a regular file (symlinks are followed), is too large, or cannot be opened.
    """
    try:
        _refuse_special(os.stat(path).st_mode, path, what)  # before opening: opening a device may already do something
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:  # the file may have been exchanged between the two calls
            status = os.fstat(descriptor)
            _refuse_special(status.st_mode, path, what)
            if limit is not None and status.st_size > limit:
                raise _too_large(path, status.st_size, limit, what)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character or a lone surrogate in the path
        raise unreadable(path, error, what) from error


def regular(path: str | Path, limit: int | None = None, what: str = "File") -> Path:
    """Return ``path`` if it is a regular file that can be opened.

    Raises:
        WadiError: see `open_regular`.
    """
    open_regular(path, limit, what).close()
    return Path(path)


def read_bytes(path: str | Path, limit: int | None = None, what: str = "File") -> bytes:
    """Return the contents of a regular file of at most ``limit`` bytes.

    Raises:
        WadiError: see `open_regular`.
    """
    with open_regular(path, limit, what) as stream:
        try:
            data = stream.read()  # of a size that open_regular checked; files below /proc have size 0, and are small
        except OSError as error:
            raise unreadable(path, error, what) from error
    if limit is not None and len(data) > limit:
        raise _too_large(path, len(data), limit, what)
    return data


def read_text(path: str | Path, limit: int | None = None, what: str = "File") -> str:
    """Return the contents of a regular file in UTF-8, with line ends as ``\\n``.

    Raises:
        WadiError: see `open_regular`; or if it is not UTF-8.
    """
    data = read_bytes(path, limit, what)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at position {error.start:,}"
        raise WadiError(f"{what} {shown(path)} is not UTF-8 text: {byte}. Save it as UTF-8.") from error


def unreadable(path: str | Path, error: BaseException, what: str = "File") -> WadiError:
    """Return the error for a path that could not be read, with the system's own reason."""
    if isinstance(error, WadiError):
        return error
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return WadiError(f"{what} {shown(path)} does not exist. Check the path.")
    return WadiError(f"{what} {shown(path)} cannot be read: {reason(error)}. Give a readable file.")


def reason(error: BaseException) -> str:
    """Return the system's reason for an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def kind_of(mode: int) -> str:
    """Return what a path is that is not a regular file, with its article, from its ``st_mode``."""
    return next((name for test, name in KINDS if test(mode)), "not a regular file")


def shown(path: str | Path) -> str:
    """Return the path in quotes, its middle left out if it is very long."""
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}")


def _refuse_special(mode: int, path: str | Path, what: str) -> None:
    if not stat.S_ISREG(mode):
        raise WadiError(f"{what} {shown(path)} is {kind_of(mode)}. Give a regular file.")


def _too_large(path: str | Path, size: int, limit: int, what: str) -> WadiError:
    return WadiError(f"{what} {shown(path)} has {size:,} bytes. At most {limit:,} are read: check that it is the right file.")
