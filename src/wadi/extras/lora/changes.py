"""Find the layer of a pipeline that each part of a LoRA changes, and add the change to its weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.extras.lora.delta import weight_change
from wadi.extras.lora.entries import Entry, check_complete, group_by_layer, scaling
from wadi.extras.lora.file import LoraFile
from wadi.extras.lora.lorad import find_layer
from wadi.extras.lora.names import Place, convert_names, layer_places, resolve_names
from wadi.extras.lora.other_formats import check_known_keys


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer.

    Attributes:
        part: attribute of the pipeline that contains the layer, such as ``unet``.
        layer: name of the layer within the part.
        scale: alpha over rank.
    """

    part: str
    layer: str
    entry: Entry
    scale: float


@dataclass(frozen=True)
class _Matched:
    """The entries of a file, its keys of no known format, and the place of each entry whose layer was found."""

    entries: Mapping[str, Entry]
    unknown: list[str]
    places: Mapping[str, Place]


def find_changes(pipeline: Any, component: str, file: LoraFile) -> list[LayerChange]:
    """Return the change of each layer. Every tensor of the file belongs to one of them. ``pipeline`` is not changed.

    Args:
        component: attribute of the pipeline that contains the backbone's network.
    Raises:
        WadiError: if a tensor fits no layer, has another shape than its layer needs, or is of a format that is not supported.
    """
    matched = _match(pipeline, component, file)
    check_known_keys(file.path, matched.unknown, len(file.tensors))
    changes, misshapen_keys = [], []
    for module, (part, layer) in matched.places.items():
        entry = matched.entries[module]
        check_complete(entry)
        config = file.configs.get("", {}) | file.configs.get(part, {})
        change = LayerChange(part, layer, entry, scaling(entry, config, part, layer))
        misshapen_keys += _misshapen_keys(change, find_layer(getattr(pipeline, part), layer))
        changes.append(change)
    homeless = (entry for module, entry in matched.entries.items() if module not in matched.places)
    _check_base(pipeline, file, [key for entry in homeless for key in entry.keys.values()], misshapen_keys)
    if len({(change.part, change.layer) for change in changes}) < len(changes):
        raise WadiError(f"LoRA {str(file.path)!r} names a layer twice, in two spellings. Keep one of them.")
    return changes


def _match(pipeline: Any, component: str, file: LoraFile) -> _Matched:
    entries, unknown = group_by_layer(file.tensors)
    table = layer_places(pipeline, component)
    places = resolve_names(pipeline, entries, table)
    matched = _Matched(entries, unknown, places)
    if len(places) < len(entries) or unknown:
        used_keys = {key for module in places for key in entries[module].keys.values()}
        return _match_converted(pipeline, file, used_keys, table) or matched
    return matched


def _match_converted(pipeline: Any, file: LoraFile, used_keys: Collection[str], table: Mapping[str, Place]) -> _Matched | None:
    """Match a transformer's LoRA after diffusers' converter renamed it; None if that does not help.

    Keys that are used already are not converted, nor are those of text encoders: the converter drops T5's.
    """
    if getattr(pipeline, "transformer", None) is None or not hasattr(pipeline, "lora_state_dict"):
        return None
    rest = {
        key: tensor
        for key, tensor in file.tensors.items()
        if key not in used_keys and not key.startswith(("lora_te", "text_encoder"))
    }
    if any("dora_scale" in name or "magnitude" in name for name in rest):  # the converter would drop them
        return None
    kept, unknown = group_by_layer({key: tensor for key, tensor in file.tensors.items() if key not in rest})
    try:
        renamed, unknown_renamed = group_by_layer(convert_names(pipeline, rest))
    except Exception:  # the message then names the keys as they are in the file
        return None
    if kept.keys() & renamed.keys():  # one layer in two spellings
        return None
    entries = {**kept, **renamed}
    return _Matched(entries, [*unknown, *unknown_renamed], resolve_names(pipeline, entries, table))


def _check_base(pipeline: Any, file: LoraFile, homeless_keys: list[str], misshapen_keys: list[str]) -> None:
    """Raise `WadiError` if the LoRA was trained on another model."""
    problems = [
        f"{len(keys)} {problem} (first: {keys[0]})"
        for keys, problem in (
            (sorted(homeless_keys), "keys that fit no layer"),
            (sorted(misshapen_keys), "of another shape"),
        )
        if keys
    ]
    if problems:
        raise WadiError(
            f"LoRA {str(file.path)!r} is for another base than this {type(pipeline).__name__}: {', '.join(problems)} of "
            f"{len(file.tensors)}. Use one that was trained on this model or its teacher."
        )


def _misshapen_keys(change: LayerChange, layer: Any) -> list[str]:
    """Return the keys whose shapes do not fit the layer. Only shapes are computed, no values."""
    keys, tensors = change.entry.keys, change.entry.tensors
    try:
        weight_change(change.entry, change.scale, layer.weight.to("meta"))
        if "up_bias" in tensors and tensors["up_bias"].shape != getattr(layer.bias, "shape", None):
            return [keys["up_bias"]]
    except (RuntimeError, IndexError, ValueError):
        misshapen = []
        if "down" in tensors and "mid" not in tensors:  # find out which of the two does not fit
            misshapen += [keys["down"]] * (tensors["down"].shape[1] != layer.weight.shape[1])
            misshapen += [keys["up"]] * (len(tensors["up"]) != len(layer.weight))
        return misshapen or list(keys.values())
    return []


@torch.no_grad()
def add_change(pipeline: Any, change: LayerChange, scale: float, angles: Tensor | None) -> None:
    """Replace the layer's weight by ``W + scale dW``, or with a student's angles by ``W + scale rot(dW, theta_s)``.

    With angles, ``dW`` is computed on the teacher's weight ``rot(W, -theta_s)``, because DoRA depends on its norms.
    """
    from wadi.lorad.rotation import rotate

    layer: Any = find_layer(getattr(pipeline, change.part), change.layer)
    W = layer.weight.float()
    if angles is None:
        delta = weight_change(change.entry, change.scale, W)
    else:
        delta = rotate(weight_change(change.entry, change.scale, rotate(W, -angles)), angles)
    layer.weight.copy_(W + scale * delta)
    if "up_bias" in change.entry.tensors:
        bias = change.entry.tensors["up_bias"].to(layer.bias.device).float()
        layer.bias.copy_(layer.bias.float() + scale * change.scale * bias)
