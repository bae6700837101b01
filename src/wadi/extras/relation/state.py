"""Save an unfinished training next to its output file, and continue from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.moments import moments_of, restore_moments
from wadi.io.records import Count, Record, parse_json
from wadi.io.tensors import read_with_metadata

MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}  # Adam's names, and those in the file


@dataclass
class TokenState:
    """Progress of a training.

    Attributes:
        rows: embedding of the token for each text encoder; the parameters of ``optimizer``.
        step: number of steps done.
        skipped: steps whose gradient was not finite.
        statistics: one row per step.
    """

    rows: list[Tensor]
    optimizer: torch.optim.Adam
    step: int = 0
    skipped: int = 0
    statistics: list[dict[str, Any]] = field(default_factory=list)


class Note(Record):
    """The header of a saved `TokenState`; ``network`` is None in states of earlier versions."""

    step: Count
    skipped: Count
    stats: list[dict[str, Any]]
    job: str
    network: str | None = None


def partial_path(out: Path) -> Path:
    """Return where the state of an unfinished training into ``out`` is saved."""
    return out.with_name(f"{out.stem}.partial.safetensors")


def statistics_path(out: Path) -> Path:
    """Return where the statistics of a training into ``out`` are written, one JSON object per line."""
    return out.with_suffix(".jsonl")


def save_state(out: Path, state: TokenState, job: str, network: str) -> None:
    """Save ``state``.

    Args:
        job: digest of the settings, the exemplars and the start.
        network: digest of the teacher's network.
    """
    from safetensors.torch import save as to_bytes

    tensors = {f"{i}.row": row.detach() for i, row in enumerate(state.rows)} | moments_of(state.optimizer, "", MOMENTS)
    note = {"step": state.step, "skipped": state.skipped, "stats": state.statistics, "job": job, "network": network}
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(partial_path(out), to_bytes(plain, metadata={"note": json.dumps(note)}))


def resume_state(out: Path, state: TokenState, job: str, networks: Sequence[str]) -> None:
    """Restore ``state`` from an interrupted training into ``out``, if there is one.

    Args:
        job: digest of the settings, the exemplars and the start.
        networks: digests of the teacher's network, as this version and earlier ones compute it.
    Raises:
        WadiError: if the saved state is damaged or belongs to another training.
    """
    path = partial_path(out)
    if not path.is_file():
        return
    what, remedy = f"The unfinished training {str(path)!r}", f"Use the same command as before, or delete {str(path)!r}."
    tensors, metadata = read_with_metadata(path, "The unfinished training", remedy)
    if "note" not in metadata:
        raise WadiError(f"{what} is damaged: it has no note. {remedy}")
    note: Note = parse_json(metadata["note"], Note, what)
    if note.job != job:
        raise WadiError(f"{what} has other settings, exemplars or teacher. {remedy}")
    if note.network not in (None, *networks):
        raise WadiError(f"{what} belongs to another teacher (network {note.network}, now {networks[0]}). {remedy}")
    for i, row in enumerate(state.rows):
        with torch.no_grad():
            row.copy_(tensors[f"{i}.row"])
        tensors[f"{i}.step"] = torch.tensor(float(note.step - note.skipped))
    restore_moments(state.optimizer, tensors, "", {**MOMENTS, "step": "step"})
    state.step, state.skipped, state.statistics = note.step, note.skipped, note.stats


def finish_state(out: Path, state: TokenState) -> None:
    """Write the statistics, and remove the saved state."""
    lines = "".join(json.dumps(row) + "\n" for row in state.statistics)
    write_whole(statistics_path(out), lines.encode())
    with suppress(OSError):
        partial_path(out).unlink(missing_ok=True)
