"""Save and resume, whole or not at all, without pickle.

A checkpoint is a folder ``step-N``: ``student/`` and ``fake/`` (adapter folders), ``training.safetensors`` (both optimisers'
moments, the moving average, the generator's state), ``state.json`` (step, position in the data, scalers, fingerprint of the
teacher) and ``manifest.json`` (SHA-256 of every file). It is filled under a temporary name and renamed, so a folder ``step-N``
is complete or was altered afterwards, which the manifest tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wadi import roles
from wadi.errors import WadiError, first_line
from wadi.io.files import remove_folder, sha256, whole_folder
from wadi.io.records import Count, Finite, Record, read_json
from wadi.io.regular import require_file
from wadi.io.weight_checks import non_finite_names
from wadi.parallel.ranks import Ranks


@dataclass
class TrainState:
    """What a run is at a step, besides its config and its frozen weights."""

    network: Any
    optimizers: dict[str, Optimizer]  # by role; each holds roles.parameters(network, role) in order
    scalers: dict[str, Any]  # torch.amp.GradScaler by role
    generator: torch.Generator
    ema: dict[str, Tensor] = field(default_factory=dict)  # of the student's angles, by roles.state_dict's names
    step: int = 0
    drawn: int = 0  # prompts drawn so far
    skipped: int = 0  # steps with a non-finite gradient, in all
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)  # by role
    seconds: float = 0.0  # wall-clock time in the loop
    prompts: str = ""  # hash of the prompts that ``drawn`` counts
    images: int = 0  # per step, of all processes
    pipeline: str | None = None  # digest of the whole teacher: `wadi.backbones.digest`
    ranks: Ranks = field(default_factory=Ranks)


class Saved(Record):
    """``state.json``: see `TrainState`. What is None here was not written by earlier versions."""

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


COUNTERS = ("step", "drawn", "skipped", "skipped_in_a_row", "seconds")


def fingerprint(network: nn.Module) -> str:
    """A short hash of a network's weights: names, shapes and the first values of each, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if "lorad_" not in name:
            head = tensor.flatten()[:64].float().cpu().numpy().tobytes()
            digest.update(f"{name.replace('.base_layer', '')}{tuple(tensor.shape)}".encode() + head)
    return digest.hexdigest()[:16]


def _training_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {"generator": state.generator.get_state()}
    for role, optimizer in state.optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in _flat(moments).items():
                tensors[f"{role}.{index}.{name}"] = torch.as_tensor(value)
    tensors.update({f"ema.{key}": value for key, value in state.ema.items()})
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _flat(moments: dict[str, Any]) -> dict[str, Any]:
    """Moments of one parameter by name; those of a group (bitsandbytes keeps what it quantizes in one) as ``group/name``."""
    flat: dict[str, Any] = {}
    for name, value in moments.items():
        if isinstance(value, dict):  # its tables are shared by all parameters, and files share nothing
            flat |= {f"{name}/{inner}": tensor.clone() for inner, tensor in value.items()}
        else:
            flat[name] = value
    return flat


def save(folder: Path, state: TrainState, teacher: str, keep: int, keep_every: int = 0) -> Path:
    """Write ``folder/step-N`` and then remove the intact checkpoints older than the newest ``keep`` intact ones.

    Args:
        teacher: fingerprint of the frozen weights.
        keep_every: checkpoints of steps that this divides are never removed; 0 = none.
    Raises:
        WadiError: if the disk is full, the folder is not writable, or the state has a number that is not finite; earlier
            checkpoints stay.
    """
    from safetensors.torch import save_file

    refuse_not_finite(state)
    tensors = _training_tensors(state)
    if name := _not_finite(tensors.items()):
        raise _not_saved(state, name)
    target = place(folder, state.step)
    with whole_folder(target) as temporary:
        for role in state.optimizers:
            (temporary / role).mkdir()
            roles.write(state.network, role, temporary / role)
        save_file(tensors, temporary / "training.safetensors")
        plain = {name: getattr(state, name) for name in COUNTERS}
        plain["scalers"] = {role: scaler.state_dict() for role, scaler in state.scalers.items()}
        plain |= {"teacher": teacher, "prompts": state.prompts, "images": state.images, "pipeline": state.pipeline}
        (temporary / "state.json").write_text(json.dumps(plain, indent=2))
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {file.relative_to(temporary).as_posix(): sha256(file) for file in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for old in surplus(folder, state.step, keep, keep_every):
        remove_folder(old)
    return target


def surplus(folder: Path, step: int, keep: int, keep_every: int = 0) -> list[Path]:
    """Return the checkpoints to remove once that of ``step`` is written: those older than the newest ``keep`` intact ones.

    A damaged checkpoint does not count. One of a later step is left alone: a run that continues from ``step`` passed over it
    because it is damaged, and writes it anew when it gets there.
    """
    older = [path for path in reversed(_all(folder)) if step_of(path) < step]
    intact = 1
    for position, path in enumerate(older):
        if intact == keep:
            return [old for old in older[position:] if keep_every == 0 or step_of(old) % keep_every]
        intact += _damage(path, _versions(path)) is None
    return []


def refuse_not_finite(state: TrainState) -> None:
    """Raise `WadiError` if an angle is NaN or infinite: no run could continue from it, and no image could be generated."""
    for role in state.optimizers:
        angles = {name: value.detach() for name, value in roles.parameters(state.network, role).items()}
        if name := _not_finite(angles.items()):
            raise _not_saved(state, f"{role}'s {name}")


def _not_saved(state: TrainState, name: str) -> WadiError:
    return WadiError(
        f"At step {state.step} a number is not finite ({name}). Nothing was written; earlier checkpoints are untouched. Start "
        "anew with a lower student.lr and fake.lr, or with dtype bfloat16 or float32."
    )


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that has a NaN or an infinity."""
    return next((name for name, value in tensors if non_finite_names({name: value})), None)


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"step-{step:07d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; temporary names and copies under other names are not among them."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(numbered, key=step_of)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files or with the numbers in them, or None."""
    return _damage.__wrapped__(path, ()) or _unusable(path)


def _versions(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Names, sizes, times and inodes of a checkpoint's files: equal as long as no program changes one."""
    found = [(file, file.lstat()) for file in sorted(path.rglob("*"))]
    return tuple((str(file), status.st_size, status.st_mtime_ns, status.st_ino) for file, status in found)


@lru_cache(maxsize=256)
def _damage(path: Path, versions: tuple[tuple[str, int, int, int], ...]) -> str | None:
    """What differs from the manifest, or None; kept by ``versions``, as hashing takes a second per GB."""
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
    """What a run could not continue from although the manifest agrees, or None."""
    from safetensors import SafetensorError

    try:
        plain: Saved = read_json(path / "state.json", Saved, "Checkpoint state")
        if plain.step != step_of(path):
            return f"state.json is of step {plain.step}"
        for file in sorted(path.rglob("*.safetensors")):
            if name := _not_finite(_tensors_of(file)):
                return f"{name} in {file.relative_to(path).as_posix()} is not finite"
    except (OSError, ValueError, SafetensorError) as error:  # WadiError is a ValueError
        return f"its contents cannot be read: {first_line(error)}"
    return None


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file, one at a time."""
    from safetensors import safe_open

    with safe_open(require_file(file), framework="pt") as tensors:
        yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and one line for each newer one that is damaged.

    Raises:
        WadiError: if there are checkpoints and none is intact.
    """
    found, complaints = _all(folder), list[str]()
    for path in reversed(found):
        trouble = damage(path)
        if trouble is None:
            return path, complaints
        complaints.append(f"Checkpoint {str(path)!r} is damaged ({trouble}) and was passed over.")
    if complaints:
        raise WadiError(
            f"No checkpoint in {str(folder)!r} is intact: {complaints[0]} Expected the files as they were written: restore "
            "them from a copy, or delete the folder to start the run anew."
        )
    return None, []


def load(path: Path, state: TrainState, teacher: str) -> None:
    """Put ``state`` where the checkpoint left it, to the bit.

    Raises:
        WadiError: if the checkpoint was made on other frozen weights or another architecture.
    """
    from safetensors.torch import load_file

    plain: Saved = read_json(path / "state.json", Saved, "Checkpoint state")
    if plain.teacher != teacher:
        raise WadiError(
            f"Checkpoint {str(path)!r} was made on a teacher with fingerprint {plain.teacher}; this teacher has {teacher}. "
            "Expected the same weights: give the original teacher, or another --out."
        )
    if None not in (plain.pipeline, state.pipeline) and plain.pipeline != state.pipeline:
        raise WadiError(
            f"Checkpoint {str(path)!r} was made with a teacher whose files have the digest {str(plain.pipeline)[:16]}; "
            f"those of this teacher have {str(state.pipeline)[:16]}. Weights, a config, a tokenizer or the schedule changed "
            "since: restore the original teacher, or choose another --out."
        )
    if state.prompts and plain.prompts not in (None, state.prompts):
        raise WadiError(
            f"Checkpoint {str(path)!r} was made with other prompts than there are now. Expected the same, as it stands amid "
            "them: restore the prompts, or choose another --out."
        )
    if state.images and plain.images not in (None, state.images):
        raise WadiError(
            f"Checkpoint {str(path)!r} was made with {plain.images} images a step; now there are {state.images} ("
            f"{state.ranks.count} processes x batch x accumulate). Expected the same number: set --batch and --accumulate."
        )
    tensors = load_file(require_file(path / "training.safetensors"))
    for role, optimizer in state.optimizers.items():
        _, saved = roles.read(path / role)
        roles.restore(state.network, role, saved, repr(str(path)))
        try:
            _refuse_moments(optimizer, role, tensors)
            _restore_optimizer(optimizer, role, tensors)
            state.scalers[role].load_state_dict(plain.scalers[role])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise _misfit(path, f"the state of {role}'s optimiser", error) from error
    try:
        for key, value in state.ema.items():
            value.copy_(tensors[f"ema.{key}"])
        state.generator.set_state(tensors["generator"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise _misfit(path, "the moving average or the generator", error) from error
    for name in COUNTERS:
        setattr(state, name, getattr(plain, name))


def _misfit(path: Path, part: str, error: Exception) -> WadiError:
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}".rstrip(".")
    return WadiError(
        f"Checkpoint {str(path)!r} does not fit this run: {part} in training.safetensors or state.json ({reason}). Restore the "
        "files as they were written, or delete this checkpoint: the run then continues from an earlier one."
    )


def _refuse_moments(optimizer: Optimizer, role: str, tensors: dict[str, Tensor]) -> None:
    """Raise `ValueError` if a moment has another shape than its parameter: the optimiser would take it, and then go astray."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        names = ("step", "exp_avg", "exp_avg_sq")
        stored = {name: tensors[key] for name in names if (key := f"{role}.{index}.{name}") in tensors}
        for name in names if "exp_avg" in stored or "exp_avg_sq" in stored else ():
            moment = stored[name]
            if name != "step" and (moment.shape != parameter.shape or moment.dtype != torch.float32):
                raise ValueError(
                    f"{role}.{index}.{name} is {tuple(moment.shape)} of {str(moment.dtype).removeprefix('torch.')}, and its "
                    f"parameter is {tuple(parameter.shape)}"
                )


def _restore_optimizer(optimizer: Optimizer, role: str, tensors: dict[str, Tensor]) -> None:
    restored = optimizer.state_dict()
    restored["state"] = {}
    for key, value in tensors.items():
        if key.startswith(f"{role}."):
            _, index, name = key.split(".")
            place = restored["state"].setdefault(int(index), {})
            *group, name = name.split("/")
            place = place.setdefault(group[0], {}) if group else place
            counted = not value.ndim and not value.is_floating_point()  # steps are a whole number in bitsandbytes
            place[name] = int(value) if counted else value
    optimizer.load_state_dict(restored)
