"""Families in a file: run it if the user named it, and never because a folder or a settings file names it.

A file of Python can do anything. `name_family` runs the file that a user names on a command line, and notes its SHA-256 digest
in the user's cache folder. A run stores the path of its file. `use_family` runs that file for a later command if the digest of
its contents is one of those noted. So a run, export or configuration from elsewhere cannot have anything executed, whatever
path it names; nor can a file that changed since the user named it.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from wadi.backbones import registry
from wadi.errors import WadiError, first_line
from wadi.io.files import write_whole
from wadi.io.regular import exists, quoted, read_bytes
from wadi.io.user_cache import cache_folder

LARGEST = 10 * 2**20  # bytes of a file
WHAT = "Family file"
_loaded: set[str] = set()  # digests of the files that this process has run
_named: set[str] = set()  # of those, the ones that its command line named


def name_family(path: str | Path) -> Path:
    """Run the family file that the user has named, and note that they did. Return its absolute path.

    Raises:
        WadiError: if the file cannot be read, fails, or registers no complete family.
    """
    place = Path(path).expanduser().resolve()
    source, digest = _read(place)
    _run(place, source, digest)
    _named.add(digest)
    with suppress(WadiError):  # without a writable cache, later commands need the option again
        write_whole(_note(digest), f"{place}\n".encode(errors="replace"))
    return place


def use_family(path: str | Path | None, whose: str) -> None:
    """Run the family file that a run or a configuration names, if the user has named a file with these contents before.

    Nothing happens if ``path`` is None, or if the command line of this process has named a file itself.

    Args:
        whose: who names the file, at the start of the message, such as ``"Run 'runs/a'"``.
    Raises:
        WadiError: if the file does not exist, or was never named as it is now.
    """
    if not path or _named:
        return
    place = Path(path).expanduser()
    if not exists(place):
        raise WadiError(
            f"{whose} needs the family file {quoted(place)}, which does not exist. Name the file with --family FILE.py."
        )
    source, digest = _read(place)
    if digest in _loaded:
        return
    if not _is_noted(digest):
        raise WadiError(
            f"{whose} needs the family file {quoted(place)}. You have not named it on a command line here, or it has changed "
            "since. It can run any code: read it, and then name it with --family FILE.py."
        )
    _run(place, source, digest)


def _read(path: Path) -> tuple[bytes, str]:
    """Return the contents of a family file, and their digest."""
    source = read_bytes(path, LARGEST, WHAT)
    return source, hashlib.sha256(source).hexdigest()


def _note(digest: str) -> Path:
    return cache_folder() / "families" / digest


def _is_noted(digest: str) -> bool:
    try:
        return _note(digest).is_file()
    except WadiError:  # this user has no cache folder
        return False


def _run(path: Path, source: bytes, digest: str) -> None:
    """Run the file once in this process. The digest and the code are of the same bytes."""
    if digest in _loaded:
        return
    name = f"wadi_family_{digest[:16]}"
    module, before = ModuleType(name), dict(registry.FAMILIES)
    module.__file__ = str(path)
    sys.modules[name] = module  # so that "module:class" finds it
    try:
        exec(compile(source, str(path), "exec"), vars(module))
        if before == registry.FAMILIES:
            raise WadiError("it registers no family. Call register_family('TheirPipeline', YourClass) at its end")
    except Exception as error:  # the file may raise anything
        del sys.modules[name]
        registry.FAMILIES.clear()
        registry.FAMILIES.update(before)
        reason = str(error).rstrip(".") if isinstance(error, WadiError) else f"{type(error).__name__}: {first_line(error)}"
        raise WadiError(f"{WHAT} {quoted(path)} cannot be used: {reason}. See docs/add-a-family.md.") from error
    _loaded.add(digest)
