"""The folder of a study: its resolved settings, the state of each run, and the lock that keeps a second study out.

study.json            cells with all their settings, seeds, evaluation, budget
runs/CELL--seed-0/    an ordinary run, with the result of `wadi eval` in eval/ and that of `wadi analyze` in analysis/
state/                how far each run is, how long it took, and why it failed
configs/, logs/       the settings file and the output of each run
images/, pairs/       generated images, the reference's included; pairs of warm starts, shared by the runs of a seed
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wadi.distill.config_files import to_dict
from wadi.distill.run_folder import LOCK, lock_file, unlock_file
from wadi.errors import WadiError
from wadi.evaluate.generated import differences
from wadi.io.files import write_whole
from wadi.io.outputs import JUNK, check_writable, write_error
from wadi.io.records import as_json, read_json
from wadi.study.cells import Cell
from wadi.study.file import Study

FILE = "study.json"
TIMING = "--timing"  # end of the names of short runs, which only measure
SHOWN = 3  # differences in a message


@contextmanager
def opened(folder: Path, study: Study, cells: Sequence[Cell]) -> Iterator[None]:
    """Create the folder of a study, or check that an existing one belongs to it. Within the block no other study can use it.

    The same study may have more cells and seeds than before. Before its first run, everything may change.

    Raises:
        WadiError: if the folder holds another study or other files (the message names the differences), another process uses
            it, or it cannot be written.
    """
    check_writable(folder, folder=True)
    new = as_json(_contents(study, cells))
    changed = _check(folder, new)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptors = lock_file(folder / LOCK)
    except OSError as error:
        raise write_error(folder, error) from error
    if not descriptors:
        raise WadiError(f"Another process runs the study in {str(folder)!r}. Wait for it, stop it, or choose another --out.")
    try:
        if changed:
            write_whole(folder / FILE, (json.dumps(new, indent=1) + "\n").encode())
        yield
    finally:
        unlock_file(folder / LOCK, descriptors)


def _check(folder: Path, new: dict[str, Any]) -> bool:
    """Return whether the file of the study has to be written. Raise `WadiError` if the folder belongs to something else."""
    file = folder / FILE
    if not file.exists():
        others = sorted({path.name for path in folder.iterdir()} - JUNK - {LOCK}) if folder.exists() else []
        if others:
            raise WadiError(f"--out {str(folder)!r} contains {others[0]!r} and is not a study. Choose a new folder.")
        return True
    old = read_json(file, dict[str, Any], "Study folder", remedy="Choose a new --out.")
    cells, seeds = old.get("cells"), old.get("seeds")
    if not isinstance(cells, dict) or not isinstance(seeds, list):
        raise WadiError(f"{str(file)!r} is not the file of a study. Choose a new --out.")
    if all(path.name.endswith(TIMING) for path in (folder / "runs").glob("*")):
        return bool(old != new)
    if missing := [name for name in cells if name not in new["cells"]] + [seed for seed in seeds if seed not in new["seeds"]]:
        what = "cell" if isinstance(missing[0], str) else "seed"
        raise WadiError(
            f"--out {str(folder)!r} contains another study: its {what} {missing[0]!r} is not in this one. Cells and seeds can "
            "be added to a study, not taken away: choose a new --out."
        )
    if changed := differences(old, {**new, "cells": {name: new["cells"][name] for name in cells}, "seeds": seeds}):
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise WadiError(
            f"--out {str(folder)!r} contains a study with other settings: {'; '.join(changed[:SHOWN])}{more}. Choose a new "
            "--out, or restore the settings."
        )
    return bool(old != new)


def _contents(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    settings = {name: to_dict(getattr(study, name)) for name in ("eval", "budget", "tune")}
    flags = {"analysis": study.analysis, "swap": study.swap}
    return {"cells": {cell.name: to_dict(cell.config) for cell in cells}, "seeds": list(study.seeds), **flags, **settings}
