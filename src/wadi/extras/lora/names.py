"""Find the layer of a pipeline that a name in a LoRA file means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wadi.extras.lora.entries import group_by_layer
from wadi.io.quiet import errors_only
from wadi.lorad.stored import PEFT_PREFIX

Place = tuple[str, str]  # (part of the pipeline, layer in it)

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# What trainers write before the name of a layer, where its words are joined by dots, and where by underscores.
_DOTTED = {
    "unet": ("unet.", "diffusion_model.", PEFT_PREFIX, f"{PEFT_PREFIX}unet.", ""),
    "transformer": ("transformer.", "diffusion_model.", PEFT_PREFIX, f"{PEFT_PREFIX}transformer.", ""),
}
_UNDERSCORED = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_transformer_", "lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),  # kohya numbers T5 3, OneTrainer 2, also where there are two encoders
    "text_encoder_3": ("lora_te3_",),
}
# diffusers' first names of a text encoder's and an attention's projections
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def layer_places(pipeline: Any, component: str) -> dict[str, Place]:
    """Return ``{name: (part, layer)}`` for every layer of the network and the text encoders, under all names in use.

    Args:
        component: attribute of the pipeline that contains the backbone's network.
    """
    table: dict[str, Place] = {}
    ambiguous: set[str] = set()
    parts = [component, *(name for name in _TEXT_ENCODERS if getattr(pipeline, name, None) is not None)]
    for part in parts:
        for layer in _weighted_layers(getattr(pipeline, part)):
            for name in _names_of(part, layer):
                if name in table and table[name][0] != part:
                    ambiguous.add(name)
                table.setdefault(name, (part, layer))
    for name in ambiguous:  # the network keeps the name; among text encoders nobody can say which one is meant
        if table[name][0] != component:
            del table[name]
    return table


def _weighted_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) >= 2]


def _names_of(part: str, layer: str) -> Iterable[str]:
    spellings = [layer]
    if part in _TEXT_ENCODERS:  # transformers 5 dropped "text_model.", which all files have
        bare = layer.removeprefix("text_model.")
        spellings = [bare, f"text_model.{bare}"]
    for name in spellings:
        yield from (prefix + name for prefix in _DOTTED.get(part, (f"{part}.", PEFT_PREFIX)))
        yield from (prefix + name.replace(".", "_") for prefix in _UNDERSCORED[part])


def modern_name(module: str) -> str:
    """Return a module's name without diffusers' earlier spellings (``attn1.processor.to_out``, ``self_attn.to_q``)."""
    name = module.replace(".processor.", ".")
    head, _, last = name.rpartition(".")
    if last in _ATTENTION and head.endswith("self_attn"):
        return f"{head}.{_ATTENTION[last]}"
    if last == "to_out" and re.search(r"\.attn\d?$", head):
        return f"{name}.0"
    return name


def resolve_names(pipeline: Any, modules: Iterable[str], table: Mapping[str, Place]) -> dict[str, Place]:
    """Return ``{module: (part, layer)}`` for those modules of a file that are layers of the pipeline.

    Args:
        table: see `layer_places`.
    """
    places = {}
    for module in modules:
        place = table.get(modern_name(module)) or table.get(_name_from_checkpoint(pipeline, module))
        if place is not None:
            places[module] = place
    return places


def _name_from_checkpoint(pipeline: Any, module: str) -> str:
    """Return diffusers' name for a U-Net layer named as in the original checkpoint (``input_blocks.4.1...``), or ""."""
    unet = getattr(pipeline, "unet", None)
    name = re.sub(r"^(lora_unet_|diffusion_model\.|model\.diffusion_model\.)", "", module)
    if unet is None or name == module:
        return ""
    underscored = "lora_unet_" + name.replace(".", "_")
    # diffusers' converter renames the tensors of a LoRA. Zeros of one number serve for LoHa and LoKr too.
    stand_ins = {f"{underscored}.{side}.weight": torch.zeros(1, 1) for side in ("lora_down", "lora_up")}
    try:
        with errors_only():
            renamed, _ = pipeline.lora_state_dict(stand_ins, unet_config=unet.config)
        (entry,), _ = group_by_layer(renamed)
    except Exception:  # the converter raises errors of many types on a name that it does not know
        return ""
    return modern_name(entry)


def convert_names(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's LoRA in diffusers' names, by diffusers' converter. Joined layers (FLUX's ``qkv``) are split.

    Raises:
        Exception: of any type, if diffusers does not know the names.
    """
    renamed = {}
    for key, tensor in tensors.items():  # the converter knows kohya's names but not ComfyUI's
        match = re.fullmatch(r"diffusion_model\.(.+?)\.(lora_[AB]|lora_down|lora_up|alpha)(\.weight)?", key)
        if match:
            side = {"lora_A": "lora_down", "lora_B": "lora_up"}.get(match[2], match[2])
            key = f"lora_unet_{match[1].replace('.', '_')}.{side}{match[3] or ''}"
        renamed[key] = tensor
    with errors_only():
        converted = pipeline.lora_state_dict(renamed)
    return dict(converted[0] if isinstance(converted, tuple) else converted)
