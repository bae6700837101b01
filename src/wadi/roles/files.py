"""Save and load adapter folders as PEFT writes them: ``adapter_model.safetensors``, ``adapter_config.json``.

A student's folder also has ``wadi.json``: the timestep and the resolution of the student, and its teacher (`About`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wadi.diffusion.schedulers import check_timesteps
from wadi.errors import WadiError, first_line
from wadi.io.files import whole_folder
from wadi.io.records import Count, Digest, Record, Side, read_json
from wadi.io.tensors import open_tensors
from wadi.io.weight_checks import check_finite, check_floats, shapes, tensor_differences
from wadi.lorad.stored import PEFT_PREFIX
from wadi.roles import methods
from wadi.roles.layers import attach, state_dict

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FILES = (WEIGHTS, CONFIG, "wadi.json")  # everything that `save` writes


def write(model: nn.Module, name: str, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write adapter ``name`` into an existing ``folder`` as PEFT does.

    Args:
        tensors: values to write instead of the current ones, such as a moving average; named as `state_dict` names them.
    """
    from safetensors.torch import save_file

    live = tensors if tensors is not None else state_dict(model, name)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in live.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config: Any = model.peft_config  # by adapter name
    config[name].save_pretrained(folder)


def save(
    model: nn.Module,
    name: str,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write adapter ``name`` to a new ``folder``, completely or not at all.

    Args:
        tensors: see `write`.
        extra: content of ``wadi.json``; no such file if None.
    """
    with whole_folder(folder) as temporary:
        write(model, name, temporary, tensors)
        if extra is not None:
            (temporary / "wadi.json").write_text(json.dumps(extra, indent=2) + "\n")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``(config, tensors)`` of an adapter folder of any PEFT method.

    Raises:
        WadiError: if it is not an adapter folder, is damaged, or has values that are not finite floating-point numbers.
    """
    config = read_config(folder)
    with open_tensors(folder / WEIGHTS) as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    check_floats(f"Adapter {str(folder)!r}", tensors)
    check_finite(f"Adapter {str(folder)!r}", tensors)
    return config, tensors


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of an adapter folder without reading its weights.

    Raises:
        WadiError: if it is not an adapter folder, or its config is damaged.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise WadiError(f"{str(folder)!r} is not an adapter folder: it must contain {CONFIG} and {WEIGHTS}.")
    config: dict[str, Any] = read_json(folder / CONFIG, dict[str, Any], "Adapter config")
    return config


def check_lorad(folder: Path, config: dict[str, Any]) -> None:
    """Raise `WadiError` if the adapter of ``folder`` is of another method than LoRaD.

    Only LoRaD configs are read from folders: those of some other methods can make PEFT import modules that they name.
    """
    if config.get("peft_type") != "LORAD":
        raise WadiError(
            f"Adapter {str(folder)!r} is of type {config.get('peft_type')!r} by its {CONFIG}. It must be a LoRaD adapter "
            "('LORAD')."
        )


class About(Record):
    """``wadi.json`` of a student's adapter.

    Attributes:
        timesteps: at which the student generates, the noisiest first.
        timestep: the same, in files of earlier versions.
        resolution: ``(height, width)`` that it was trained at; None in adapters that do not say: the model's own.
        teacher: pipeline folder, Hub id or ``zoo``.
        teacher_digest: of the teacher's files (`wadi.backbones.digest`); None in adapters of earlier versions.
    """

    timesteps: tuple[Count, ...] = ()
    timestep: Count | None = None
    resolution: tuple[Side, Side] | None = None
    teacher: str = "zoo"
    teacher_digest: Digest | None = None


def read_about(folder: Path) -> About:
    """Read ``wadi.json`` of a student's adapter folder.

    Raises:
        WadiError: if the file is missing or damaged, or has no timesteps or impossible ones.
    """
    about: About = read_json(folder / "wadi.json", About, "The record of the student's timestep")
    if not about.timesteps and about.timestep is None:
        raise WadiError(f"{str(folder / 'wadi.json')!r} has no 'timesteps'. Restore the file as it was written.")
    about.timesteps = check_timesteps(about.timesteps or (about.timestep,), repr(str(folder / "wadi.json")))
    return about


def is_students(folder: Path) -> bool:
    """Return whether the adapter in ``folder`` is a student's: its ``wadi.json`` has timesteps.

    Raises:
        WadiError: if ``wadi.json`` is damaged.
    """
    file = folder / "wadi.json"
    if not file.is_file():
        return False
    record: dict[str, Any] = read_json(file, dict[str, Any], "The record of the adapter")
    return bool(record.keys() & {"timesteps", "timestep"})


def restore(model: nn.Module, name: str, tensors: dict[str, Tensor], source: object = "the checkpoint") -> None:
    """Copy ``tensors`` into the attached adapter ``name``.

    Raises:
        WadiError: if names or shapes differ, naming the first ones that do.
    """
    attached = state_dict(model, name)
    if differences := tensor_differences(shapes(attached), shapes(tensors), PEFT_PREFIX):
        raise WadiError(
            f"Adapter {name!r} from {source} does not fit this model: {differences}. It must have the same "
            "architecture, target layers and rank: use the teacher that it was trained on."
        )
    for key, value in tensors.items():
        attached[key].copy_(value)


def load(model: nn.Module, folder: Path, name: str) -> None:
    """Attach the adapter of ``folder`` to ``model`` as ``name``: LoRaD, or another one of `wadi.roles.methods`.

    Raises:
        WadiError: if the folder is damaged, or the adapter is of an unknown method or for another architecture (which keys).
    """
    stored, tensors = read(folder)
    config = _config(folder, stored)
    layers = {layer_of(key) for key in tensors}
    if missing_layers := sorted(layers - {layer for layer, _ in model.named_modules()}):
        more = f" and {len(missing_layers) - 1} more" if len(missing_layers) > 1 else ""
        raise WadiError(
            f"Adapter {str(folder)!r} is for another architecture: this model has no layer {missing_layers[0]!r}{more}. Use "
            "the teacher that the adapter was trained on."
        )
    _check_ranks(stored, tensors, repr(str(folder)))
    attach(model, name, config)
    restore(model, name, tensors, repr(str(folder)))


def layer_of(key: str) -> str:
    """Return the name of the layer that a tensor of an adapter file belongs to, for any method."""
    return re.split(r"\.[a-z]+_[^.]*(?:$|\.weight$)", key.removeprefix(PEFT_PREFIX))[0]


def _check_ranks(stored: dict[str, Any], tensors: dict[str, Tensor], source: str) -> None:
    """Raise `WadiError` if a rank exceeds every side of the stored tensors: nothing of that size is then allocated."""
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    ranks = [stored.get("r"), *(stored.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if isinstance(rank, int) and rank > largest:
            raise WadiError(
                f"Adapter {source} has rank {rank} in its {CONFIG}, and tensors of at most {largest} rows or columns. Restore "
                "the file as it was written."
            )


def _config(folder: Path, stored: dict[str, Any]) -> Any:
    """Return the PEFT config of an adapter folder."""
    from peft import PeftConfig

    if stored.get("peft_type") != "LORAD":
        return methods.stored_config(stored, repr(str(folder)))
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        if isinstance(error, WadiError):
            raise WadiError(f"Adapter {str(folder)!r}: {error}") from error
        raise WadiError(
            f"Adapter {str(folder)!r} has a {CONFIG} that PEFT cannot read: {first_line(error)}. "
            "Restore the file as it was written."
        ) from error
