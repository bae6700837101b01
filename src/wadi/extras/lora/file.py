"""LoRA files as people have them: which tensors belong to which layer, whoever wrote the file.

Trainers write the same matrices under different names. diffusers: ``unet.LAYER.lora_A.weight``; PEFT:
``base_model.model.LAYER.lora_A.weight`` with ``adapter_config.json`` next to it; kohya's sd-scripts and LyCORIS:
``lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight`` and ``.alpha``; ComfyUI and many others: ``diffusion_model.LAYER...``.
`entries` sorts the tensors by layer under one set of names; `wadi.extras.lora.names` finds the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.records import parse_json, read_json
from wadi.io.tensors import read_tensors
from wadi.io.weights import listed

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for the file in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA, LOHA, LOKR = ("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2")

_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"[._]lora(?:_linear_layer)?[._](?P<side>down|up|mid)(?:\.\w+)?\.weight"
    r"|\.lora_(?P<letter>[AB])(?:\.\w+)?\.(?P<kind>weight|bias)"
    r"|\.(?P<plain>alpha|dora_scale|(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))(?:\.\w+)?"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*"
    r")"
)
# What else a file can hold, by a mark in its keys: the name, and what to do with it.
_OTHERS = (
    (r"lorad_[AB]", "a LoRaD adapter", "Give the folder that contains the file."),
    (r"^image_proj\.|^ip_adapter\.", "an IP-Adapter", "Use it with --control."),
    (r"^(controlnet_|control_model\.|lora_controlnet)|\.zero_convs\.", "a ControlNet", "Use it with --control."),
    (r"^(emb_params|string_to_param|clip_[lg]|<[^>]*>)$", "a textual inversion", "Use it with --token."),
    (r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.", "a whole checkpoint", "Convert it to a pipeline "
     "folder (StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)) and use it as --teacher."),
    (r"oft_(diag|blocks|[rRsS]\b)|boft_", "an OFT or BOFT adapter", ""),
    (r"\.on_input$|ia3_", "an (IA)^3 adapter", ""),
    (r"\.(diff|diff_b|set_weight)$", "a file of whole weight differences", ""),
    (r"glora_|\.[ab][12]\.weight$", "a GLoRA", ""),
    (r"lora_embedding_|modules_to_save", "an adapter that also trains embeddings or whole layers", ""),
    (r"^bundle_emb\.", "a LoRA with textual inversions bundled in", "Take the tensors named bundle_emb.* out of the file."),
    (r"\.[wb]_norm$", "a LyCORIS file that also trains normalisation layers", ""),
    (r"vera_lambda|\.lora_E$|ranknum", "an AdaLoRA or VeRA", ""),
)  # fmt: skip
SAVE_AGAIN = "Save the adapter again."
MERGE = "Merge it into the teacher with the tool that trained it, and use the merged model."


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's tensors by their names in the file, and the PEFT settings that came with them.

    Attributes:
        configs: settings by part of the pipeline (``unet``, ``text_encoder``); under ``""`` those of all parts.
    """

    path: Path
    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Entry:
    """What a LoRA changes in one layer.

    Attributes:
        module: the layer's name in the file.
        tensors: by `LORA`, `LOHA` or `LOKR` names; also ``alpha``, ``magnitude`` (of DoRA), ``mid``, ``up_bias``.
        keys: the tensors' names in the file.
    """

    module: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> LoraFile:
    """Read a safetensors file, and the PEFT settings in its header or next to it.

    Raises:
        WadiError: if the file is damaged, empty, or has NaN or infinite values.
    """
    tensors, header = read_tensors(path, "LoRA")
    if not tensors:
        raise WadiError(f"LoRA {str(path)!r} is empty: it has no tensors. Give a trained one.")
    configs: dict[str, dict[str, Any]] = {}
    if "lora_adapter_metadata" in header:  # diffusers: {"unet.lora_alpha": ...}
        for name, value in _json(path, header["lora_adapter_metadata"]).items():
            part, _, setting = name.partition(".")
            configs.setdefault(part, {})[setting] = value
    beside = path.parent / PEFT_CONFIG
    if path.name == PEFT_FILE and beside.is_file():
        configs[""] = read_settings(beside)
    return LoraFile(path, tensors, configs)


def peft_type(folder: Path) -> str:
    """Return the method of a PEFT adapter folder, by its config.

    Raises:
        WadiError: if the config is damaged.
    """
    file = folder / PEFT_CONFIG
    return str(read_settings(file).get("peft_type"))


def read_settings(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        WadiError: if it cannot be read or is something else.
    """
    found: dict[str, Any] = read_json(file, dict[str, Any], "The settings of the LoRA in", remedy=SAVE_AGAIN)
    return found


def _json(path: Path, text: str) -> dict[str, Any]:
    found: dict[str, Any] = parse_json(text, dict[str, Any], f"The settings of the LoRA in {str(path)!r}", SAVE_AGAIN)
    return found


def entries(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Entry], list[str]]:
    """Sort tensors by layer; also returns the names that no format known here has."""
    found: dict[str, Entry] = {}
    unknown = []
    for key, tensor in tensors.items():
        matched = _KEY.fullmatch(key)
        if matched is None:
            unknown.append(key)
            continue
        if matched["letter"]:
            name = {"A": "down", "B": "up"}[matched["letter"]] + ("_bias" if matched["kind"] == "bias" else "")
        else:
            name = matched["side"] or matched["plain"] or matched["magnitude"]
        entry = found.setdefault(matched["module"], Entry(matched["module"]))
        if name in entry.tensors:
            raise WadiError(f"The LoRA has {key} twice, also as {entry.keys[name]}. Keep one of them.")
        entry.tensors[name], entry.keys[name] = tensor, key
    return found, unknown


def refuse_unknown(path: Path, unknown: list[str], total: int) -> None:
    """Raise `WadiError` that says what kind of file it is if there are ``unknown`` keys."""
    for key in unknown:
        for mark, kind, remedy in _OTHERS:
            if re.search(mark, key):
                raise WadiError(f"{str(path)!r} is {kind} (it has {key}), which --lora cannot apply. {remedy or MERGE}")
    if unknown:
        raise WadiError(
            f"LoRA {str(path)!r} has {len(unknown)} of {total} keys that fit no layer and no format known here: "
            f"{listed(unknown)}. Supported are LoRA (with Tucker decomposition, DoRA), LoHa and LoKr."
        )


def scaling(entry: Entry, config: Mapping[str, Any], part: str, layer: str) -> float:
    """Return what a layer's product is multiplied by: ``alpha / rank``, or 1 where the file says nothing of alpha.

    Args:
        config: PEFT settings of the adapter (``lora_alpha``, ``r``, ``alpha_pattern``, ``use_rslora``); may be empty.
    Raises:
        WadiError: if a setting is not a number, or alpha is not one number.
    """
    rank = rank_of(entry)
    full = "lokr_w1" in entry.tensors and "lokr_w2" in entry.tensors
    if "alpha" in entry.tensors:
        stored = entry.tensors["alpha"]
        if stored.numel() != 1:
            raise WadiError(f"{entry.keys['alpha']} has shape {tuple(stored.shape)}. The alpha of a layer is one number.")
        return 1.0 if full else float(stored) / rank  # LyCORIS does not scale a LoKr of two whole factors
    given = "lora_alpha" if "lora_alpha" in config else "alpha"
    if given not in config:
        return 1.0
    alpha = _number(_pattern(config.get("alpha_pattern"), layer, config[given]), f"{part}.{given}")
    if "down" not in entry.tensors:  # PEFT scales LoHa and LoKr by the rank of its settings, also where factors are whole
        rank = max(1, int(_number(_pattern(config.get("rank_pattern"), layer, config.get("r", rank)), f"{part}.r")))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def rank_of(entry: Entry) -> int:
    """Return the inner dimension of a layer's product; 1 where there is none."""
    for name, side in (("down", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0)):
        if name in entry.tensors and entry.tensors[name].ndim > side:
            return max(1, int(entry.tensors[name].shape[side]))
    return 1


def _pattern(patterns: object, layer: str, default: object) -> object:
    """The value for ``layer`` among ``{name or its end: value}``; PEFT reads the names as regular expressions, we do not."""
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = str(name).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.search(r"[\\*+?()\[\]{}|^$]", plain):
            raise WadiError(f"The LoRA's settings have a pattern {name!r:.80}. Only names of layers are supported: {MERGE}")
        if layer == plain or layer.endswith(f".{plain}"):
            return value
    return default


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise WadiError(f"The LoRA's settings have {name} {value!r:.80}. A number is needed.")
    return float(value)


def refuse_odd_shapes(entry: Entry) -> None:
    """Raise `WadiError` if a layer's tensors are incomplete, are scalars or vectors, or are no numbers."""
    names = entry.tensors.keys()
    complete = (
        names >= set(LORA) or names >= set(LOHA) or all(name in names or {f"{name}_a", f"{name}_b"} <= names for name in LOKR)
    )
    if not complete:
        raise WadiError(
            f"The LoRA is incomplete: of layer {entry.module!r} it has only {listed(list(entry.keys.values()))}. Save it again."
        )
    for name, tensor in entry.tensors.items():
        if name in ("alpha", "dora_scale", "lora_magnitude_vector", "up_bias", "down_bias"):
            continue
        if tensor.ndim < 2 or not tensor.numel() or tensor.dtype == torch.bool:
            raise WadiError(
                f"The LoRA's tensor {entry.keys[name]} has shape {tuple(tensor.shape)}. A matrix is needed: save the file "
                "again."
            )
