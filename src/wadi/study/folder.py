"""The folder of a study: its resolved settings, the state of each run, and the lock that keeps a second study out.

study.json            cells with all their settings, seeds, evaluation, budget
runs/CELL--seed-0/    an ordinary run, with the result of `wadi eval` in eval/ and that of `wadi analyze` in analysis/
state/                how far each run is, how long it took, and why it failed
configs/, logs/       the settings file and the output of each run
images/               generated images, the reference's included
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wadi.distill.config_files import to_dict
from wadi.errors import WadiError
from wadi.evaluate.generated import differences
from wadi.io.files import write_whole
from wadi.io.outputs import JUNK, check_writable, write_error
from wadi.io.records import as_json, read_json
from wadi.study.cells import Cell
from wadi.study.file import Study

FILE, LOCK = "study.json", ".lock"
SHOWN = 3  # differences in a message


def open_folder(folder: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Create the folder of a study, or check that an existing one belongs to it. More cells and seeds may be added.

    Raises:
        WadiError: if the folder holds another study or other files (the message names the differences), or cannot be written.
    """
    new = as_json(_contents(study, cells))
    check_writable(folder, folder=True)
    file = folder / FILE
    if file.exists():
        old = read_json(file, dict[str, Any], "Study folder", remedy="Choose a new --out.")
        if not isinstance(old.get("cells"), dict):
            raise WadiError(f"{str(file)!r} is not the file of a study. Choose a new --out.")
        if missing := [name for name in old["cells"] if name not in new["cells"]]:
            raise WadiError(
                f"--out {str(folder)!r} contains another study: its cell {missing[0]!r} is not in this one. Cells can be "
                "added to a study, not taken away: choose a new --out."
            )
        kept = {**new, "cells": {name: new["cells"][name] for name in old["cells"]}, "seeds": old.get("seeds")}
        if changed := differences(old, kept):
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise WadiError(
                f"--out {str(folder)!r} contains a study with other settings: {'; '.join(changed[:SHOWN])}{more}. Choose a new "
                "--out, or restore the settings."
            )
        if lost := [seed for seed in old.get("seeds", []) if seed not in new["seeds"]]:
            raise WadiError(
                f"--out {str(folder)!r} contains runs with seed {lost[0]}. Keep it under seeds, or choose a new --out."
            )
        if old == new:
            return
    elif folder.exists() and (others := sorted({path.name for path in folder.iterdir()} - JUNK - {LOCK})):
        raise WadiError(f"--out {str(folder)!r} contains {others[0]!r} and is not a study. Choose a new folder.")
    write_whole(file, (json.dumps(new, indent=1) + "\n").encode())


def _contents(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    budget = to_dict(study.budget)
    return {
        "cells": {cell.name: to_dict(cell.config) for cell in cells},
        "seeds": list(study.seeds),
        "eval": to_dict(study.eval),
        "analysis": study.analysis,
        "budget": budget,
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process can run the same study. The lock ends with the process.

    Raises:
        WadiError: if another process has the lock, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows: each run has a lock of its own
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise WadiError(
                    f"Another process runs the study in {str(folder)!r}. Wait for it, stop it, or choose another --out."
                ) from error
        yield  # some network file systems have no locks; each run has one of its own
    finally:
        os.close(descriptor)
