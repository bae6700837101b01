"""Read regular files only: reading a FIFO, a socket or a device could block or never end.

`read_bytes` and `read_text` read a file. `require_file` checks a file that a library will open itself. `exists`, `is_file` and
`is_dir` work for every path. ``Path.exists`` raises for a path that no file system allows (too long, NUL characters, lone
surrogates).
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
    """Open ``path`` for reading bytes. Never blocks.

    Args:
        limit: largest size in bytes.
        what: name of the file's contents at the start of a message, such as ``Prompts file``.
    Raises:
        WadiError: if the file is missing, is not a regular file (symlinks are followed), is too large, or cannot be opened.
    """
    try:
        _check_regular(os.stat(path).st_mode, path, what)  # before opening: opening a device may already do something
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:  # check again: the file may have been replaced between the two calls
            status = os.fstat(descriptor)
            _check_regular(status.st_mode, path, what)
            if limit is not None and status.st_size > limit:
                raise _too_large(path, status.st_size, limit, what)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character or a lone surrogate in the path
        raise read_error(path, error, what) from error


def require_file(path: str | Path, limit: int | None = None, what: str = "File") -> Path:
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
            data = stream.read()  # open_regular has checked the size; files below /proc report size 0, and are small
        except OSError as error:
            raise read_error(path, error, what) from error
    if limit is not None and len(data) > limit:
        raise _too_large(path, len(data), limit, what)
    return data


def read_text(path: str | Path, limit: int | None = None, what: str = "File") -> str:
    """Return the contents of a regular UTF-8 file, with ``\\n`` at the end of each line.

    Raises:
        WadiError: see `open_regular`; or if it is not UTF-8.
    """
    data = read_bytes(path, limit, what)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at position {error.start:,}"
        raise WadiError(f"{what} {quoted(path)} is not UTF-8 text: {byte}. Save it as UTF-8.") from error


def read_error(path: str | Path, error: BaseException, what: str = "File") -> WadiError:
    """Return the error to raise for a path that could not be read, with the system's reason."""
    if isinstance(error, WadiError):
        return error
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return WadiError(f"{what} {quoted(path)} does not exist. Check the path.")
    return WadiError(f"{what} {quoted(path)} cannot be read: {system_reason(error)}. Give a readable file.")


def system_reason(error: BaseException) -> str:
    """Return the system's reason for an error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def kind_of(mode: int) -> str:
    """Return the kind of something that is not a regular file, with its article, from its ``st_mode``."""
    return next((name for is_kind, name in KINDS if is_kind(mode)), "not a regular file")


def quoted(path: str | Path) -> str:
    """Return the path in quotes. Of a very long path the middle is left out."""
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}")


def _check_regular(mode: int, path: str | Path, what: str) -> None:
    if not stat.S_ISREG(mode):
        raise WadiError(f"{what} {quoted(path)} is {kind_of(mode)}. Give a regular file.")


def _too_large(path: str | Path, size: int, limit: int, what: str) -> WadiError:
    return WadiError(f"{what} {quoted(path)} has {size:,} bytes; the limit is {limit:,}. Check that it is the right file.")
