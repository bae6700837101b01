"""Files and folders are written whole or not at all, and no file of the user's is deleted.

A temporary name next to the target is filled, flushed to disk, then renamed. Temporary names are random, are created anew
(never through a symbolic link) and are locked while their process lives, so that the next writer can tell what a killed one
left.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from wadi.errors import WadiError
from wadi.io.regular import exists, is_dir, kind_of, open_regular, reason, shown

JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers leave these anywhere
PATIENCE = 10.0  # seconds
_NAME_BYTES = 180  # of a name within a temporary name: file systems allow 255


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


def check_writable(path: str | Path, suffixes: Sequence[str] = (), folder: bool = False) -> None:
    """Check that a file (or folder) can be written at ``path``. Call it before the work whose result goes there.

    Leaves nothing behind: folders that do not exist yet are not created.

    Args:
        suffixes: endings that the name may have, in small letters, each with its dot; none = any.
        folder: whether ``path`` is to be a folder.
    Raises:
        WadiError: if the name has another ending, something else is in the way, or the folder above cannot be written.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise WadiError(f"Cannot write {shown(path)}: the name must end in {' or '.join(suffixes)}.")
    try:
        _refuse_in_the_way(path, folder)
        above = path if folder else path.parent
        while not above.exists() and above != above.parent:
            above = above.parent
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{shown(above)} is not a folder")
        longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if any(len(os.fsencode(part)) > longest for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        descriptor, trial = _create(above / "check")
        os.close(descriptor)
        trial.unlink()
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error


def check_out(path: str | Path, folder: bool = True) -> None:
    """Check that nothing is at ``path`` and that a folder (or file) can be written there; see `check_writable`.

    Raises:
        WadiError: if something exists there, or it cannot be written.
    """
    if os.path.lexists(path):
        kind = "folder" if folder else "file"
        raise WadiError(f"--out {shown(path)} exists. Expected a new {kind}: choose another name.")
    check_writable(path, folder=folder)


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; on any failure what was there before is still there.

    Raises:
        WadiError: see `whole_file`.
    """
    with whole_file(path) as stream:
        stream.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to write, which becomes ``path`` when the block ends and vanishes if it fails.

    Raises:
        WadiError: if the folder cannot be written, the disk is full, or ``path`` is not a regular file.
    """
    descriptor, temporary = -1, None
    try:
        _refuse_in_the_way(path, folder=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_files(path.parent)
        descriptor, temporary = _create(path)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if os.name == "nt":  # Windows renames no open file; elsewhere the lock is held to the end
                stream.close()
            os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) or (isinstance(error, ValueError) and temporary is None):  # NUL bytes in the path
            raise unwritable(path, error) from error
        raise


@contextmanager
def whole_folder(path: Path, known: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` when the block ends and vanishes if it fails.

    A folder that is there already is replaced if each of its files is written anew or matches ``known``. Files that we did
    not write are never deleted. Of two writers at the same time one wins with all its files.

    Args:
        known: patterns of relative paths (``*.png``) that earlier results may contain and this one may lack. Call
            `refuse_foreign` with all names before long work: here the check comes last.
    Raises:
        WadiError: if the folder contains a file of the user's, the disk is full, or the place cannot be written.
    """
    held, temporary, known = -1, None, tuple(known)
    try:
        try:
            path = Path(os.path.realpath(path))  # a link to a folder stays; its folder is replaced
        except ValueError as error:  # a NUL character
            raise unwritable(path, error) from error
        _refuse_in_the_way(path, folder=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent) as alone:
            _sweep(path.parent, [glob.escape(path.name)], alone)
        temporary, held = _create_folder(path)
        yield temporary
        _finish(temporary)
        with _alone(path.parent) as alone:
            _sweep(path.parent, [glob.escape(path.name)], alone)
            refuse_foreign(path, (*known, *map(glob.escape, _files_in(temporary))))
            _swap(temporary, path)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk through an exception class of its own
        path_error = isinstance(error, ValueError) and temporary is None
        if isinstance(error, OSError) or path_error or type(error).__name__ == "SafetensorError":
            raise unwritable(path, error) from error
        raise
    finally:
        if held >= 0:
            os.close(held)


def refuse_foreign(folder: Path, known: Iterable[str]) -> None:
    """Check, before the work, that `whole_folder` may replace ``folder``: that it contains only files that match ``known``.

    Args:
        known: patterns of paths relative to ``folder``, with ``/``, which ``*`` does not match.
    Raises:
        WadiError: if it contains another file (which).
    """
    patterns = tuple(known)
    for name in _files_in(folder):
        if name.rpartition("/")[2] not in JUNK and not any(_matches(name, pattern) for pattern in patterns):
            raise WadiError(
                f"Folder {shown(folder)} contains {shown(name)}, which this command did not write and would delete. Move the "
                "file elsewhere, or choose another folder."
            )


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def remove_folder(path: Path) -> None:
    """Remove a folder; renamed first, so that a process killed meanwhile leaves no half of it under its name."""
    with _alone(path.parent):
        doomed = _spare(path, "doomed")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def unwritable(path: str | Path, error: BaseException) -> WadiError:
    """Return the error for a path that could not be written, with the system's own reason."""
    if isinstance(error, WadiError):
        return error
    return WadiError(
        f"Cannot write {shown(path)}: {reason(error)}. Expected a writable folder with free space; what was saved before is "
        "untouched. Free some space or choose another folder, then run the same command again."
    )


def _refuse_in_the_way(path: Path, folder: bool) -> None:
    """Raise what stands at ``path`` and is of another kind than what is to be written there."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if folder and not stat.S_ISDIR(mode):
        raise FileExistsError(errno.EEXIST, "a file of that name is in the way")
    if not folder and not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, f"it is {kind_of(mode)}")


# --- temporary names --------------------------------------------------------------------------------------------------------

# `.run.<random>.tmp`, `.run.<random>.old`, `.run.<random>.doomed`; earlier versions put a process number there, or nothing
_LEFTOVER = re.compile(r"\.(?P<name>.+?)\.(?:[0-9a-f]+\.(?P<end>tmp|old)|(?:[0-9a-f]+\.)?doomed)")
_swept: set[str] = set()  # folders in which this process looked for leftovers of files


def _spare(path: Path, end: str) -> Path:
    """A new name beside ``path`` that nobody can foresee."""
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.{end}")


def _stem(path: Path) -> str:
    """The name of ``path`` within temporary names, or a short one where the whole would be too long for a file system."""
    return path.name if len(os.fsencode(path.name)) <= _NAME_BYTES else "long-name"


def _create(path: Path) -> tuple[int, Path]:
    """A new, locked temporary file for ``path``, readable as the umask says: its descriptor and name."""
    while True:
        temporary = _spare(path, "wadi.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if _keep(descriptor, temporary):
            return descriptor, temporary


def _create_folder(path: Path) -> tuple[Path, int]:
    """A new, locked temporary folder for ``path``, and the descriptor that holds the lock (-1 where there is none)."""
    while True:
        temporary = _spare(path, "tmp")
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover
            continue
        except PermissionError:  # Windows opens no folders
            return temporary, -1
        if _keep(descriptor, temporary):
            return temporary, descriptor


def _keep(descriptor: int, path: Path) -> bool:
    """Lock what was just created; False if another process took it for a leftover in between."""
    _flock(descriptor, wait=True)
    if exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return True
    os.close(descriptor)
    return False


def _flock(descriptor: int, wait: bool) -> bool:
    """Take the lock of an open file; False if another process keeps it, or if the system has no locks.

    ``wait``: for at most `PATIENCE` seconds. Ours are short; others may hold a folder for long (``flock FOLDER wadi ...``).
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
def _alone(folder: Path) -> Iterator[bool]:
    """Within the block no other process renames in ``folder`` through this module; False where that cannot be had."""
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
def _dead(path: Path) -> Iterator[bool]:
    """Whether no living process holds ``path``, a temporary file or folder.

    Remove it within the block: who has just created it then waits for the lock, and finds that it is gone.
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
    """Clear what killed processes left in ``folder`` of folders with these names, which may be patterns (``step-*``).

    A folder that stepped aside for one that never came is put back: it is the only copy.
    """
    if is_dir(folder):
        with _alone(folder) as alone:
            _sweep(folder, names, alone)


def _sweep(folder: Path, names: Iterable[str], alone: bool) -> None:
    """`sweep` by a process that is alone with ``folder``, or else clears only what is locked by its writer."""
    with os.scandir(folder) as entries:
        left = [(entry.name, found) for entry in entries if (found := _LEFTOVER.fullmatch(entry.name))]
    for leftover, found in sorted(left):
        path, target = folder / leftover, folder / found["name"]
        if not any(fnmatch.fnmatchcase(found["name"], name) for name in names) or path.is_symlink() or not path.is_dir():
            continue
        if found["end"] == "tmp":
            with _dead(path) as dead:
                if dead:
                    shutil.rmtree(path, ignore_errors=True)
        elif not alone:  # renamed by a process that was alone
            continue
        elif found["end"] == "old" and not exists(target):
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sweep_files(folder: Path) -> None:
    """Clear temporary files of killed processes; once per folder, which may contain many files."""
    if str(folder) in _swept:
        return
    _swept.add(str(folder))
    for leftover in folder.glob(".*.wadi.tmp"):
        if leftover.is_file():
            with _dead(leftover) as dead, suppress(OSError):
                if dead:
                    leftover.unlink()


# --- folders ----------------------------------------------------------------------------------------------------------------


def _files_in(folder: Path) -> list[str]:
    """Paths of all files below ``folder``, relative and with ``/``, sorted; links are not followed."""
    found = []
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        found += [Path(above, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _finish(folder: Path) -> None:
    """Give files the permissions that the umask allows (libraries write them for their owner alone) and flush them to disk."""
    readable = stat.S_IMODE(folder.stat().st_mode) & 0o666  # a new folder has what the umask leaves of 777
    for name in _files_in(folder):
        file = folder / name
        if file.is_symlink():
            continue
        with suppress(PermissionError):
            file.chmod(stat.S_IMODE(file.stat().st_mode) | readable)
        with open_regular(file) as stream:
            os.fsync(stream.fileno())


def _swap(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``. One call cannot replace a folder: the old one steps aside and goes last."""
    if not exists(path):
        os.replace(new, path)
        return
    old = _spare(path, "old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
