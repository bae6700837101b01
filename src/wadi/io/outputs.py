"""Check, before long work, that its result can be written: check the name, the permissions and existing files."""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from wadi.errors import WadiError
from wadi.io.regular import kind_of, quoted, system_reason
from wadi.io.temporary import create_file

JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers create these in any folder


def check_writable(path: str | Path, suffixes: Sequence[str] = (), folder: bool = False) -> None:
    """Check that a file (or folder) can be written at ``path``. Call it before the work whose result goes there.

    Leaves nothing behind: folders that do not exist yet are not created.

    Args:
        suffixes: allowed endings of the name, in lower case with the dot; any if empty.
        folder: whether ``path`` will be a folder.
    Raises:
        WadiError: if the name has another ending, something else is in the way, or the folder above cannot be written.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise WadiError(f"Cannot write {quoted(path)}: the name must end in {' or '.join(suffixes)}.")
    try:
        check_kind(path, folder)
        above = path if folder else path.parent
        while not above.exists() and above != above.parent:
            above = above.parent
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{quoted(above)} is not a folder")
        longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if any(len(os.fsencode(part)) > longest for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        descriptor, trial = create_file(above / "check")
        os.close(descriptor)
        trial.unlink()
    except (OSError, ValueError) as error:
        raise write_error(path, error) from error


def check_out(path: str | Path, folder: bool = True) -> None:
    """Check that nothing exists at ``path`` and that a folder (or file) can be written there; see `check_writable`.

    Raises:
        WadiError: if something exists there, or it cannot be written.
    """
    if os.path.lexists(path):
        raise WadiError(f"--out {quoted(path)} already exists. Choose a new {'folder' if folder else 'file'}.")
    check_writable(path, folder=folder)


def check_replaceable(folder: Path, known: Iterable[str]) -> None:
    """Check that ``folder`` contains only files that match ``known``, so that `wadi.io.files.whole_folder` may replace it.

    Args:
        known: patterns of paths relative to ``folder``, with ``/``, which ``*`` does not match.
    Raises:
        WadiError: if it contains another file. The message names it.
    """
    patterns = tuple(known)
    for name in files_in(folder):
        if name.rpartition("/")[2] not in JUNK and not any(_matches(name, pattern) for pattern in patterns):
            raise WadiError(
                f"Folder {quoted(folder)} contains {quoted(name)}, which this command did not write and would delete. Move the "
                "file elsewhere, or choose another folder."
            )


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def check_kind(path: Path, folder: bool) -> None:
    """Raise `OSError` if ``path`` exists and is not a folder (or not a regular file), as the result will be."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if folder and not stat.S_ISDIR(mode):
        raise FileExistsError(errno.EEXIST, "a file of that name is in the way")
    if not folder and not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, f"it is {kind_of(mode)}")


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files below ``folder``: relative, with ``/``, sorted. Links are not followed."""
    paths = []
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        paths += [Path(above, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(paths)


def write_error(path: str | Path, error: BaseException) -> WadiError:
    """Return the error to raise for a path that could not be written, with the system's reason."""
    if isinstance(error, WadiError):
        return error
    return WadiError(
        f"Cannot write {quoted(path)}: {system_reason(error)}. Everything saved before is unchanged. Free some space or choose "
        "another folder, then run the same command again."
    )
