"""The folders of checkpoints: which there are, which are damaged, and which may be removed.

A checkpoint is a folder ``step-N``: ``student/`` and ``fake/`` (adapter folders), ``training.safetensors`` (both optimisers'
moments, the moving average, the random generator), ``state.json`` (`Saved`) and ``manifest.json`` (SHA-256 of every file). It
is written under a temporary name and then renamed. So a folder ``step-N`` is either complete, or was changed afterwards, and
then it no longer matches its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from wadi.errors import WadiError, first_line
from wadi.io.files import sha256
from wadi.io.records import Count, Finite, Record, read_json
from wadi.io.regular import require_file
from wadi.io.weight_checks import non_finite_names


class Saved(Record):
    """``state.json``: see `wadi.distill.state.TrainState`. Earlier versions did not write the fields with a default.

    Attributes:
        drawn: prompts used so far.
        teacher: fingerprint of the frozen weights.
        prompts: digest of the prompts.
        images: per step.
        pipeline: digest of all files of the teacher.
    """

    step: Count
    drawn: Count
    skipped: Count
    skipped_in_a_row: dict[str, Count]
    seconds: Finite
    scalers: dict[str, dict[str, int | Finite]]
    teacher: str
    prompts: str | None = None
    images: Count | None = None
    pipeline: str | None = None


def place(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step``."""
    return folder / f"step-{step:07d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, and one sentence about each newer one that is damaged.

    Raises:
        WadiError: if there are checkpoints and none is intact.
    """
    complaints = list[str]()
    for path in reversed(_all(folder)):
        reason = damage(path)
        if reason is None:
            return path, complaints
        complaints.append(f"Checkpoint {str(path)!r} is damaged ({reason}) and was skipped.")
    if complaints:
        raise WadiError(
            f"No checkpoint in {str(folder)!r} is intact: {complaints[0]} Restore the files from a copy, or delete the folder "
            "to start the run again."
        )
    return None, []


def surplus(folder: Path, step: int, keep: int, keep_every: int = 0) -> list[Path]:
    """Return the checkpoints to remove after that of ``step`` is written: those older than the newest ``keep`` intact ones.

    Damaged checkpoints do not count. Checkpoints of later steps stay: a run that continues from ``step`` skipped them because
    they are damaged, and replaces them when it gets there.

    Args:
        keep_every: checkpoints of steps that this divides always stay; 0 = none.
    """
    older = [path for path in reversed(_all(folder)) if step_of(path) < step]
    intact = 1
    for position, path in enumerate(older):
        if intact == keep:
            return [old for old in older[position:] if keep_every == 0 or step_of(old) % keep_every]
        intact += _changed_file(path, _versions(path)) is None
    return []


def damage(path: Path) -> str | None:
    """Return the damage to a checkpoint's files or to the numbers in them, in words; None if it is intact."""
    return _changed_file.__wrapped__(path, ()) or _unusable(path)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or infinite value, or None."""
    return next((name for name, value in tensors if non_finite_names({name: value})), None)


def _all(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first, without temporary names and without copies under other names."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(numbered, key=step_of)


def _versions(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return names, sizes, times and inodes of a checkpoint's files. They are equal as long as no program changes a file."""
    files = [(file, file.lstat()) for file in sorted(path.rglob("*"))]
    return tuple((str(file), status.st_size, status.st_mtime_ns, status.st_ino) for file, status in files)


@lru_cache(maxsize=256)
def _changed_file(path: Path, versions: tuple[tuple[str, int, int, int], ...]) -> str | None:
    """Return what differs from the manifest, or None. Cached by ``versions``, since hashing takes a second per GB."""
    try:
        manifest: dict[str, str] = read_json(path / "manifest.json", dict[str, str], "Manifest")
    except WadiError:
        return "manifest.json is truncated or altered"
    if not {"state.json", "training.safetensors"} <= manifest.keys():
        return "manifest.json is truncated or altered"
    for name, digest in manifest.items():
        try:
            if sha256(path / name) != digest:
                return f"{name} is truncated or altered"
        except WadiError:
            return f"{name} cannot be read"
    return None


def _unusable(path: Path) -> str | None:
    """Return why no run could continue from a checkpoint that matches its manifest, or None."""
    from safetensors import SafetensorError

    try:
        saved: Saved = read_json(path / "state.json", Saved, "Checkpoint state")
        if saved.step != step_of(path):
            return f"state.json is of step {saved.step}"
        for file in sorted(path.rglob("*.safetensors")):
            if name := first_not_finite(_tensors_of(file)):
                return f"{name} in {file.relative_to(path).as_posix()} is not finite"
    except (OSError, ValueError, SafetensorError) as error:  # WadiError is a ValueError
        return f"its contents cannot be read: {first_line(error)}"
    return None


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a safetensors file, one at a time."""
    from safetensors import safe_open

    with safe_open(require_file(file), framework="pt") as tensors:
        yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
