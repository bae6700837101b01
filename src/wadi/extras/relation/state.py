"""An inversion that was interrupted goes on: the rows, Adam's moments and what was noted so far, beside the file to be."""

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
from wadi.io.regular import require_file

MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}  # Adam's names, and those in the file


@dataclass
class State:
    """Where an inversion stands: ``rows`` are the leaves that `optimiser` moves."""

    rows: list[Tensor]
    optimiser: torch.optim.Adam
    step: int = 0
    skipped: int = 0
    stats: list[dict[str, Any]] = field(default_factory=list)


class Note(Record):
    """What is kept with the tensors of a `State`; ``network`` is None in states of earlier versions."""

    step: Count
    skipped: Count
    stats: list[dict[str, Any]]
    job: str
    network: str | None = None


def partial_path(out: Path) -> Path:
    """Where an unfinished inversion into ``out`` is kept."""
    return out.with_name(f"{out.stem}.partial.safetensors")


def stats_path(out: Path) -> Path:
    """Where the figures of an inversion into ``out`` go, one JSON object a line."""
    return out.with_suffix(".jsonl")


def save(out: Path, state: State, job: str, network: str) -> None:
    """Keep ``state``; ``job`` and ``network``, digests of settings and of the teacher's network, say what it is of."""
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    for i, row in enumerate(state.rows):
        tensors[f"{i}.row"] = row.detach()
    tensors |= moments_of(state.optimiser, "", MOMENTS)
    note = json.dumps({"step": state.step, "skipped": state.skipped, "stats": state.stats, "job": job, "network": network})
    write_whole(partial_path(out), to_bytes({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata={"note": note}))


def resume(out: Path, state: State, job: str, networks: Sequence[str]) -> None:
    """Bring ``state`` to where an interrupted inversion into ``out`` stood, if there is one.

    Args:
        networks: digests of the teacher's network, of this version and of earlier ones.
    Raises:
        WadiError: if what lies there is damaged or belongs to other settings.
    """
    from safetensors import SafetensorError, safe_open

    path = partial_path(out)
    if not path.is_file():
        return
    advice = f"Expected the same command as before; to begin anew, delete {str(path)!r}."
    try:
        with safe_open(require_file(path), framework="pt") as file:
            text = (file.metadata() or {})["note"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError) as error:
        raise WadiError(f"The unfinished inversion {str(path)!r} is damaged: {error}. {advice}") from error
    note: Note = parse_json(text, Note, f"The unfinished inversion {str(path)!r}")
    if note.job != job:
        raise WadiError(f"The unfinished inversion {str(path)!r} has other settings, exemplars or teacher. {advice}")
    if note.network not in (None, *networks):  # older states do not say it
        raise WadiError(
            f"The unfinished inversion {str(path)!r} was made on another teacher (network {note.network}, now {networks[0]}). "
            f"{advice}"
        )
    for i, row in enumerate(state.rows):
        with torch.no_grad():
            row.copy_(tensors[f"{i}.row"])
        tensors[f"{i}.step"] = torch.tensor(float(note.step - note.skipped))
    restore_moments(state.optimiser, tensors, "", {**MOMENTS, "step": "step"})
    state.step, state.skipped, state.stats = note.step, note.skipped, note.stats


def finish(out: Path, state: State) -> None:
    """Write the figures and forget the unfinished state."""
    lines = "".join(json.dumps(row) + "\n" for row in state.stats)
    write_whole(stats_path(out), lines.encode())
    with suppress(OSError):
        partial_path(out).unlink(missing_ok=True)
