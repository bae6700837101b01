"""Group the tensors of a LoRA file by layer, whatever names the trainer gave them.

Trainers write the same matrices under different names. diffusers: ``unet.LAYER.lora_A.weight``; PEFT:
``base_model.model.LAYER.lora_A.weight`` with ``adapter_config.json`` next to it; kohya's sd-scripts and LyCORIS:
``lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight`` and ``.alpha``; ComfyUI and many others: ``diffusion_model.LAYER...``.
`group_by_layer` gives the tensors one set of names. `wadi.extras.lora.names` finds the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.extras.lora.other_formats import MERGE
from wadi.io.weight_checks import first_names

LORA, LOHA, LOKR = ("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2")
NOT_MATRICES = ("alpha", "dora_scale", "lora_magnitude_vector", "up_bias", "down_bias")

_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"[._]lora(?:_linear_layer)?[._](?P<side>down|up|mid)(?:\.\w+)?\.weight"
    r"|\.lora_(?P<letter>[AB])(?:\.\w+)?\.(?P<kind>weight|bias)"
    r"|\.(?P<plain>alpha|dora_scale|(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))(?:\.\w+)?"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*"
    r")"
)


@dataclass
class Entry:
    """The tensors of a file that change one layer.

    Attributes:
        module: the layer's name in the file.
        tensors: by the names in `LORA`, `LOHA` or `LOKR`; also ``alpha``, ``dora_scale`` or ``lora_magnitude_vector`` (of
            DoRA), ``mid`` and ``up_bias``.
        keys: the tensors' names in the file.
    """

    module: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def group_by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Entry], list[str]]:
    """Return ``({module: entry}, unknown keys)``. Unknown are the keys that belong to no format supported here.

    Raises:
        WadiError: if a layer has a tensor twice, under two names.
    """
    entries: dict[str, Entry] = {}
    unknown_keys = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown_keys.append(key)
            continue
        if match["letter"]:
            name = {"A": "down", "B": "up"}[match["letter"]] + ("_bias" if match["kind"] == "bias" else "")
        else:
            name = match["side"] or match["plain"] or match["magnitude"]
        entry = entries.setdefault(match["module"], Entry(match["module"]))
        if name in entry.tensors:
            raise WadiError(f"The LoRA has {key} twice, also as {entry.keys[name]}. Keep one of them.")
        entry.tensors[name], entry.keys[name] = tensor, key
    return entries, unknown_keys


def check_complete(entry: Entry) -> None:
    """Raise `WadiError` if a matrix of the layer is missing, or a tensor is not a matrix of numbers."""
    names = entry.tensors.keys()
    complete = (
        names >= set(LORA) or names >= set(LOHA) or all(name in names or {f"{name}_a", f"{name}_b"} <= names for name in LOKR)
    )
    if not complete:
        raise WadiError(
            f"The LoRA is incomplete: of layer {entry.module!r} it has only {first_names(list(entry.keys.values()))}. Save it "
            "again."
        )
    for name, tensor in entry.tensors.items():
        if name in NOT_MATRICES:
            continue
        if tensor.ndim < 2 or not tensor.numel() or tensor.dtype == torch.bool:
            raise WadiError(
                f"The LoRA's tensor {entry.keys[name]} has shape {tuple(tensor.shape)}. A matrix is needed: save the file "
                "again."
            )


def scaling(entry: Entry, config: Mapping[str, object], part: str, layer: str) -> float:
    """Return the factor of a layer's product: ``alpha / rank``, or 1 if the file gives no alpha.

    Args:
        config: PEFT settings of the adapter (``lora_alpha``, ``r``, ``alpha_pattern``, ``use_rslora``); may be empty.
    Raises:
        WadiError: if a setting is not a number, or alpha is more than one number.
    """
    rank = inner_rank(entry)
    if "alpha" in entry.tensors:
        stored = entry.tensors["alpha"]
        if stored.numel() != 1:
            raise WadiError(f"{entry.keys['alpha']} has shape {tuple(stored.shape)}. The alpha of a layer is one number.")
        undivided = "lokr_w1" in entry.tensors and "lokr_w2" in entry.tensors  # LyCORIS does not scale such a LoKr
        return 1.0 if undivided else float(stored) / rank
    setting = "lora_alpha" if "lora_alpha" in config else "alpha"
    if setting not in config:
        return 1.0
    alpha = _to_number(_value_for_layer(config.get("alpha_pattern"), layer, config[setting]), f"{part}.{setting}")
    if "down" not in entry.tensors:  # PEFT scales LoHa and LoKr by the rank of its settings, even if a factor is whole
        rank = max(1, int(_to_number(_value_for_layer(config.get("rank_pattern"), layer, config.get("r", rank)), f"{part}.r")))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def inner_rank(entry: Entry) -> int:
    """Return the inner dimension of a layer's product, or 1 if it has none."""
    for name, side in (("down", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
        if name in entry.tensors and entry.tensors[name].ndim > side:
            return max(1, int(entry.tensors[name].shape[side]))
    return 1


def _value_for_layer(patterns: object, layer: str, default: object) -> object:
    """Return the value for ``layer`` in ``{name or end of a name: value}``.

    PEFT reads the names as regular expressions. Here only plain names are supported.
    """
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = str(name).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.search(r"[\\*+?()\[\]{}|^$]", plain):
            raise WadiError(f"The LoRA's settings have a pattern {name!r:.80}. Only names of layers are supported: {MERGE}")
        if layer == plain or layer.endswith(f".{plain}"):
            return value
    return default


def _to_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise WadiError(f"The LoRA's settings have {name} {value!r:.80}. A number is needed.")
    return float(value)
