"""Save and restore the state of a run, completely or not at all, without pickle. `checkpoint_folders.py` describes the
files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from wadi import roles
from wadi.distill.checkpoint_folders import Saved, first_not_finite, place, surplus
from wadi.distill.state import TrainState
from wadi.errors import WadiError, first_line
from wadi.io.files import remove_folder, sha256, whole_folder
from wadi.io.moments import moments_of, restore_moments
from wadi.io.records import read_json
from wadi.io.regular import require_file

# Fields of `TrainState` by their names in state.json.
COUNTERS = {
    "step": "step", "drawn": "prompts_drawn", "skipped": "skipped", "skipped_in_a_row": "skipped_in_a_row",
    "seconds": "seconds",
}  # fmt: skip
MODULES = "objective."  # before the names of the tensors of an objective's modules


def save(folder: Path, state: TrainState, teacher: str, keep: int, keep_every: int = 0) -> Path:
    """Write ``folder/step-N``, and then remove surplus checkpoints. Return the new folder.

    Args:
        teacher: fingerprint of the frozen weights.
        keep: number of intact checkpoints to keep.
        keep_every: checkpoints of steps that this divides are never removed; 0 = none.
    Raises:
        WadiError: if the disk is full, the folder is not writable, or a number of the state is not finite. Earlier checkpoints
            stay.
    """
    from safetensors.torch import save_file

    refuse_not_finite(state)
    tensors = _training_tensors(state)
    if name := first_not_finite(tensors.items()):
        raise _not_saved(state, name)
    target = place(folder, state.step)
    with whole_folder(target) as temporary:
        for role in roles.attached(state.network):
            (temporary / role).mkdir()
            roles.write(state.network, role, temporary / role)
        save_file(tensors, temporary / "training.safetensors")
        values = {name: getattr(state, attribute) for name, attribute in COUNTERS.items()}
        values["scalers"] = {role: scaler.state_dict() for role, scaler in state.scalers.items()}
        values |= {"teacher": teacher, "prompts": state.prompts_digest, "images": state.images_per_step}
        values["pipeline"] = state.teacher_digest
        (temporary / "state.json").write_text(json.dumps(values, indent=2))
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {file.relative_to(temporary).as_posix(): sha256(file) for file in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for old in surplus(folder, state.step, keep, keep_every):
        remove_folder(old)
    return target


def refuse_not_finite(state: TrainState) -> None:
    """Raise `WadiError` if an adapter has a NaN or infinite value. No run could continue from it, no image be generated."""
    for role in roles.attached(state.network):
        values = {name: value.detach() for name, value in roles.parameters(state.network, role).items()}
        if name := first_not_finite(values.items()):
            raise _not_saved(state, f"{role}'s {name}")


def _not_saved(state: TrainState, name: str) -> WadiError:
    return WadiError(
        f"At step {state.step} a number is not finite ({name}). Nothing was written; earlier checkpoints are untouched. Start "
        "again with a lower student.lr and fake.lr, or with dtype bfloat16 or float32."
    )


def load(path: Path, state: TrainState, teacher: str) -> None:
    """Restore ``state`` from a checkpoint, bit for bit.

    Args:
        teacher: fingerprint of the frozen weights.
    Raises:
        WadiError: if the checkpoint was made with another teacher, other prompts, another number of images per step, or
            another architecture.
    """
    from safetensors.torch import load_file

    saved: Saved = read_json(path / "state.json", Saved, "Checkpoint state")
    _check_same_run(path, saved, state, teacher)
    tensors = load_file(require_file(path / "training.safetensors"))
    for role in roles.attached(state.network):
        _, adapter = roles.read(path / role)
        roles.restore(state.network, role, adapter, repr(str(path)))
    for role, optimizer in state.optimizers.items():
        try:
            _check_moments(optimizer, role, tensors)
            restore_moments(optimizer, tensors, f"{role}.")
            state.scalers[role].load_state_dict(saved.scalers[role])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise _misfit(path, f"the state of {role}'s optimiser", error) from error
    try:
        state.modules.load_state_dict(
            {key.removeprefix(MODULES): value for key, value in tensors.items() if key.startswith(MODULES)}
        )
        for key, value in state.ema.items():
            value.copy_(tensors[f"ema.{key}"])
        state.generator.set_state(tensors["generator"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise _misfit(path, "the objective's modules, the moving average or the generator", error) from error
    for name, attribute in COUNTERS.items():
        setattr(state, attribute, getattr(saved, name))


def _check_same_run(path: Path, saved: Saved, state: TrainState, teacher: str) -> None:
    """Raise `WadiError` if a checkpoint belongs to a run with another teacher, other prompts or another number of images."""
    if saved.teacher != teacher:
        raise WadiError(
            f"Checkpoint {str(path)!r} was made on a teacher with fingerprint {saved.teacher}; this teacher has {teacher}. Use "
            "the original teacher, or choose another --out."
        )
    if None not in (saved.pipeline, state.teacher_digest) and saved.pipeline != state.teacher_digest:
        raise WadiError(
            f"Checkpoint {str(path)!r} was made with a teacher whose files have the digest {str(saved.pipeline)[:16]}; those "
            f"of this teacher have {str(state.teacher_digest)[:16]}. Weights, a config, a tokenizer or the schedule changed. "
            "Restore the original teacher, or choose another --out."
        )
    if state.prompts_digest and saved.prompts not in (None, state.prompts_digest):
        raise WadiError(
            f"Checkpoint {str(path)!r} was made with other prompts than those of this command. Restore the prompts, or choose "
            "another --out."
        )
    if state.images_per_step and saved.images not in (None, state.images_per_step):
        raise WadiError(
            f"Checkpoint {str(path)!r} was made with {saved.images} images per step; this command has {state.images_per_step} "
            f"({state.ranks.count} processes x batch x accumulate). Set --batch and --accumulate to have the same number."
        )


def _misfit(path: Path, part: str, error: Exception) -> WadiError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return WadiError(
        f"Checkpoint {str(path)!r} does not fit this run: {part} in training.safetensors or state.json ({reason}). Restore the "
        "files as they were written, or delete this checkpoint: the run then continues from an earlier one."
    )


# --- optimisers as tensors --------------------------------------------------------------------------------------------------


def _training_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {"generator": state.generator.get_state()}
    for role, optimizer in state.optimizers.items():
        tensors |= moments_of(optimizer, f"{role}.")
    tensors |= {MODULES + key: value for key, value in state.modules.state_dict().items()}
    tensors.update({f"ema.{key}": value for key, value in state.ema.items()})
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _check_moments(optimizer: Optimizer, role: str, tensors: dict[str, Tensor]) -> None:
    """Raise `ValueError` if a moment has another shape than its parameter: the optimiser would accept it and go wrong."""
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
