"""Adapters made for the many-step model, on its one-step student: applied to the weights, so that nothing stays attached.

A LoRA adds ``dW = s (alpha / r) B A`` to each weight ``W``; a LoRaD adapter turns it by ``s A B``. The student's weight is the
teacher's, turned by the student's own angles: ``W_s = rot(W, theta_s)``.

- LoRaD: ``rot(W_s, s theta)``. Both turn in the same planes, so the angles add and the order does not matter.
- LoRA: ``W_s + dW``, what diffusers' own loader does; or, given the student's adapter, ``rot(W + dW, theta_s) = W_s +
  rot(dW, theta_s)``: the customised teacher, distilled by the angles that the plain one was distilled by. The rotation is
  linear in the weight, so it is the change alone that is turned.

docs/dreambooth.md measures which keeps what.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones import from_pipeline
from wadi.errors import WadiError
from wadi.extras.lora.delta import change
from wadi.extras.lora.file import (
    FILE,
    MERGE,
    PEFT_CONFIG,
    PEFT_FILE,
    Entry,
    LoraFile,
    entries,
    peft_type,
    read,
    read_settings,
    refuse_odd_shapes,
    refuse_unknown,
    scaling,
)
from wadi.extras.lora.names import Place, converted, places, resolve
from wadi.io.tensors import PICKLES, UNPICKLE

NAME = "customisation"
LARGEST = 4.0  # of a scale; sliders and the like stay below
PEFT_TYPES = ("LORA", "LOHA", "LOKR")


def apply_lora(pipeline: Any, file: str | Path, scale: float = 1.0, student: str | Path | None = None) -> int:
    """Put a LoRA or a DreamBooth adapter into the weights of ``pipeline``, in place; returns how many layers changed.

    Made for a one-step pipeline (`wadi.load`) and an adapter trained on its many-step teacher; a many-step pipeline
    works as well. Afterwards the pipeline is an ordinary one: no adapter is attached, one more can be applied,
    ``save_pretrained`` writes the changed weights.

    Args:
        file: LoRA, DoRA, LoHa or LoKr as diffusers, PEFT, kohya, LyCORIS or ComfyUI's trainers write them (``.safetensors``, or
            the folder that contains it), or the folder of a LoRaD adapter made by `wadi dreambooth`.
        scale: of the change, from -4 to 4; 0 leaves the pipeline as it is, bit for bit.
        student: adapter folder of the student that ``pipeline`` is: a LoRA is then turned by its angles along with the weight.
            For LoRaD the two are the same.
    Raises:
        WadiError: if the file is missing, damaged, of a kind that cannot be applied (a pickle, OFT, a student's own adapter),
            has NaN values or keys that fit no layer, or ``scale`` is out of range. The pipeline is then as it was.
    """
    check_scale(scale)
    path = find(file)
    backbone = from_pipeline(pipeline)
    roles.refuse_adapted(backbone.network)
    if path.is_dir():
        return _turn(backbone.network, path, scale)
    changes = changes_of(pipeline, backbone.component, read(path))
    angles = {} if student is None else angles_of(backbone.network, Path(student))
    if scale != 0:
        for one in changes:
            _apply(pipeline, one, scale, angles.get(one.layer) if one.part == backbone.component else None)
    return len(changes)


def check_scale(scale: float) -> None:
    """Raise `WadiError` if ``scale`` is not a sensible strength of an adapter."""
    if not math.isfinite(scale) or abs(scale) > LARGEST:
        raise WadiError(
            f"The scale of the LoRA is {scale}. Expected a number from {-LARGEST:g} to {LARGEST:g}; 1 is as it was trained, "
            "0 leaves it out."
        )


def find(file: str | Path) -> Path:
    """Return the LoRA's file, or the folder of a LoRaD adapter, that ``file`` names.

    Raises:
        WadiError: if there is none, or it is something else.
    """
    path = Path(file)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise WadiError(f"LoRA {str(path)!r} does not exist. Give a .safetensors file or an adapter's folder.")
    if path.suffix.lower() != ".safetensors":
        raise WadiError(f"LoRA {str(path)!r} is not a .safetensors file. {UNPICKLE if path.suffix in PICKLES else ''}".rstrip())
    return path


def _in_folder(path: Path) -> Path:
    if (path / FILE).is_file():
        return path / FILE
    if (path / PEFT_CONFIG).is_file():
        kind = peft_type(path)
        if kind == "LORAD":
            return path
        if kind not in PEFT_TYPES:
            raise WadiError(
                f"{str(path)!r} contains a PEFT adapter of type {kind!r}. --lora takes {', '.join(PEFT_TYPES)} and LORAD. "
                f"{MERGE}"
            )
    files = sorted(path.glob("*.safetensors"))
    if (path / PEFT_FILE).is_file() or len(files) == 1:
        return path / PEFT_FILE if (path / PEFT_FILE).is_file() else files[0]
    if files:
        raise WadiError(f"{str(path)!r} contains {len(files)} .safetensors files. Name one of them, such as {files[0].name}.")
    if pickled := [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]:
        raise WadiError(f"{str(path)!r} contains its adapter only as {pickled[0]}. {UNPICKLE}")
    raise WadiError(f"{str(path)!r} holds no adapter. Give a folder with {FILE} or {PEFT_FILE}, or the LoRA's own file.")


# --- LoRaD ------------------------------------------------------------------------------------------------------------------


def _turn(network: nn.Module, folder: Path, scale: float) -> int:
    """`rot(W, scale theta)` for every layer of a LoRaD adapter."""
    about = folder / "wadi.json"
    if about.is_file() and "timestep" in read_settings(about):
        raise WadiError(
            f"{str(folder)!r} is a student's own adapter. --lora takes a customisation (`wadi dreambooth`): to generate with "
            "this student give it as --adapter."
        )
    try:
        roles.load(network, folder, NAME)
    except WadiError:
        _remove(network)
        raise
    _set_scale(network, scale)
    layers = sum(1 for _ in roles.angles(network, NAME))
    roles.fuse(network, NAME)
    return layers


def _remove(network: nn.Module) -> None:
    """Take a half-loaded adapter off again: no angle is added at scale 0, to the bit."""
    if roles.parameters(network, NAME):
        _set_scale(network, 0.0)
        roles.fuse(network, NAME)


def _set_scale(network: nn.Module, scale: float) -> None:
    for module in network.modules():
        if NAME in getattr(module, "lorad_A", {}):
            module.set_scale(NAME, scale)  # type: ignore[operator]


def angles_of(network: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Angles ``(out, fan_in // 2)`` by layer of a student's adapter folder that fits ``network``.

    Raises:
        WadiError: if it is none, or belongs to another architecture.
    """
    _, tensors = roles.read(folder)
    found = {}
    for key in (key for key in tensors if key.endswith(".lorad_A")):
        layer = key.removeprefix("base_model.model.").removesuffix(".lorad_A")
        A, B = tensors[key].float(), tensors[key.removesuffix("A") + "B"].float()
        weight = getattr(_module(network, layer), "weight", None)
        if weight is None or (len(weight), weight[0].numel() // 2) != (len(A), B.shape[1]):
            raise WadiError(
                f"Student {str(folder)!r} is of another model: layer {layer!r} does not fit. Expected its own student."
            )
        found[layer] = (A @ B).to(weight.device)
    return found


# --- LoRA -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What a file changes in one layer of a part of the pipeline; ``scale`` is alpha over rank."""

    part: str
    layer: str
    entry: Entry
    scale: float


def changes_of(pipeline: Any, component: str, file: LoraFile) -> list[Change]:
    """Return what the LoRA changes in ``pipeline``, which is not touched. Every tensor of the file is in one of the changes.

    Raises:
        WadiError: if a tensor fits no layer, has another shape than its layer needs, or is of a format that is not supported.
    """
    found, unknown = entries(file.tensors)
    table = places(pipeline, component)
    where = resolve(pipeline, found, table)
    if len(where) < len(found) or unknown:
        used = {key for module in where for key in found[module].keys.values()}
        found, unknown, where = _by_converter(pipeline, file, used, table) or (found, unknown, where)
    refuse_unknown(file.path, unknown, len(file.tensors))
    lost = [key for module, entry in found.items() if module not in where for key in entry.keys.values()]
    changes, reshaped = [], []
    for module, (part, layer) in where.items():
        entry = found[module]
        refuse_odd_shapes(entry)
        config = file.configs.get("", {}) | file.configs.get(part, {})
        one = Change(part, layer, entry, scaling(entry, config, part, layer))
        reshaped += _misfits(one, _module(getattr(pipeline, part), layer))
        changes.append(one)
    told = [
        f"{len(keys)} {what} (first: {keys[0]})"
        for keys, what in ((sorted(lost), "keys that fit no layer"), (sorted(reshaped), "of another shape"))
        if keys
    ]
    if told:
        raise WadiError(
            f"LoRA {str(file.path)!r} is for another base than this {type(pipeline).__name__}: {', '.join(told)} of "
            f"{len(file.tensors)}. Use one that was trained on this model or its teacher."
        )
    if len({(one.part, one.layer) for one in changes}) < len(changes):
        raise WadiError(f"LoRA {str(file.path)!r} names a layer twice, in two spellings. Keep one of them.")
    return changes


def _by_converter(pipeline: Any, file: LoraFile, used: Collection[str], table: Mapping[str, Place]) -> Any:
    """``(entries, unknown, places)`` of a transformer's LoRA after diffusers' renaming; None where that does not help.

    Renamed are only keys that are not ``used`` as they are, and none of text encoders: the converter drops T5's.
    """
    if getattr(pipeline, "transformer", None) is None or not hasattr(pipeline, "lora_state_dict"):
        return None
    rest = {
        key: tensor
        for key, tensor in file.tensors.items()
        if key not in used and not key.startswith(("lora_te", "text_encoder"))
    }
    if any("dora_scale" in name or "magnitude" in name for name in rest):  # the converter would drop them
        return None
    plain, unknown = entries({key: tensor for key, tensor in file.tensors.items() if key not in rest})
    try:
        renamed, odd = entries(converted(pipeline, rest))
    except Exception:  # the keys are then reported as they are in the file
        return None
    if plain.keys() & renamed.keys():  # one layer in two spellings
        return None
    found = {**plain, **renamed}
    return found, [*unknown, *odd], resolve(pipeline, found, table)


def _misfits(one: Change, layer: Any) -> list[str]:
    """Keys of a change if it does not fit its layer; computed without any value."""
    try:
        change(one.entry, one.scale, layer.weight.to("meta"))
        if "up_bias" in one.entry.tensors and one.entry.tensors["up_bias"].shape != getattr(layer.bias, "shape", None):
            return [one.entry.keys["up_bias"]]
    except (RuntimeError, IndexError, ValueError):
        keys, tensors = one.entry.keys, one.entry.tensors
        wrong = []
        if "down" in tensors and "mid" not in tensors:  # which side it is
            wrong += [keys["down"]] * (tensors["down"].shape[1] != layer.weight.shape[1])
            wrong += [keys["up"]] * (len(tensors["up"]) != len(layer.weight))
        return wrong or list(keys.values())
    return []


@torch.no_grad()
def _apply(pipeline: Any, one: Change, scale: float, angles: Tensor | None) -> None:
    """``W + scale dW``; with a student's angles ``W + scale rot(dW, theta_s)``, where DoRA's norms are the teacher's."""
    from wadi.lorad.rotation import rotate

    layer: Any = _module(getattr(pipeline, one.part), one.layer)
    W = layer.weight.float()
    if angles is None:
        delta = change(one.entry, one.scale, W)
    else:
        delta = rotate(change(one.entry, one.scale, rotate(W, -angles)), angles)
    layer.weight.copy_(W + scale * delta)
    if "up_bias" in one.entry.tensors:
        added = one.entry.tensors["up_bias"].to(layer.bias.device).float()
        layer.bias.copy_(layer.bias.float() + scale * one.scale * added)


def attach(network: nn.Module, rank: int, target_modules: str) -> list[nn.Parameter]:
    """Freeze ``network`` and put a LoRA on the layers whose whole name matches ``target_modules``; its parameters, float32.

    ``alpha`` is the rank. ``B`` is zero: the output does not change.

    Raises:
        WadiError: if nothing matches, or matching takes too long.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    names = roles.matched(target_modules, [name for name, _ in network.named_modules() if name], "target_modules")
    exact = "|".join(map(re.escape, names)) or r"(?!)"  # PEFT would match without a limit of time
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exact), network, adapter_name=NAME)
    except ValueError as error:
        raise WadiError(
            f"The LoRA could not be attached: {_first_line(error)} Expected target_modules to be a regular expression over "
            "names of Linear or Conv2d layers."
        ) from error
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def write(pipeline: Any, folder: Path) -> None:
    """Write the LoRA that `attach` put on the pipeline's network as diffusers does: ``load_lora_weights(folder)`` reads it.

    Raises:
        WadiError: if the pipeline's family has no LoRA format in diffusers.
    """
    from peft import get_peft_model_state_dict

    component = from_pipeline(pipeline).component
    if not hasattr(pipeline, "save_lora_weights"):
        raise WadiError(f"diffusers has no LoRA format for {type(pipeline).__name__}. Expected --method lorad or full.")
    tensors = get_peft_model_state_dict(getattr(pipeline, component), adapter_name=NAME)
    layers = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    type(pipeline).save_lora_weights(folder, **{f"{component}_lora_layers": layers})


# --- small ------------------------------------------------------------------------------------------------------------------


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
