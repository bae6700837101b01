"""Read a LoRA file, and the settings of PEFT or diffusers that came with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.errors import WadiError
from wadi.io.records import parse_json, read_json
from wadi.io.tensors import read_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for the file in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SAVE_AGAIN = "Save the adapter again."


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's tensors by their names in the file, and the PEFT settings that came with them.

    Attributes:
        configs: settings by part of the pipeline (``unet``, ``text_encoder``); those of all parts under ``""``.
    """

    path: Path
    tensors: dict[str, Tensor]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_lora(path: Path) -> LoraFile:
    """Read a safetensors file, and the settings in its header or in the ``adapter_config.json`` next to it.

    Raises:
        WadiError: if the file is damaged, empty, or has NaN or infinite values.
    """
    tensors, header = read_tensors(path, "LoRA")
    if not tensors:
        raise WadiError(f"LoRA {str(path)!r} is empty: it has no tensors. Give a trained one.")
    configs: dict[str, dict[str, Any]] = {}
    if "lora_adapter_metadata" in header:  # diffusers: {"unet.lora_alpha": ...}
        for name, value in _parse_settings(path, header["lora_adapter_metadata"]).items():
            part, _, setting = name.partition(".")
            configs.setdefault(part, {})[setting] = value
    config_file = path.parent / PEFT_CONFIG
    if path.name == PEFT_FILE and config_file.is_file():
        configs[""] = read_settings(config_file)
    return LoraFile(path, tensors, configs)


def read_peft_type(folder: Path) -> str:
    """Return the method of a PEFT adapter folder, such as ``LORA``.

    Raises:
        WadiError: if its ``adapter_config.json`` is damaged.
    """
    return str(read_settings(folder / PEFT_CONFIG).get("peft_type"))


def read_settings(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        WadiError: if the file cannot be read or contains something else.
    """
    settings: dict[str, Any] = read_json(file, dict[str, Any], "The settings of the LoRA in", remedy=SAVE_AGAIN)
    return settings


def _parse_settings(path: Path, text: str) -> dict[str, Any]:
    settings: dict[str, Any] = parse_json(text, dict[str, Any], f"The settings of the LoRA in {str(path)!r}", SAVE_AGAIN)
    return settings
