"""Which layer of a pipeline a name in a LoRA file means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wadi.extras.lora.file import entries
from wadi.io.weights import quiet

Place = tuple[str, str]  # (part of the pipeline, layer in it)

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_DOTTED = {
    "unet": ("unet.", "diffusion_model.", "base_model.model.", "base_model.model.unet.", ""),
    "transformer": ("transformer.", "diffusion_model.", "base_model.model.", "base_model.model.transformer.", ""),
}
_JOINED = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_transformer_", "lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),  # kohya numbers T5 3, OneTrainer 2, also where there are two encoders
    "text_encoder_3": ("lora_te3_",),
}
# diffusers' first names of a text encoder's and an attention's projections
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def places(pipeline: Any, component: str) -> dict[str, Place]:
    """``{name: (part, layer)}`` of every layer of network and text encoders, under all the names that trainers give it."""
    found: dict[str, Place] = {}
    taken: set[str] = set()
    parts = [component, *(name for name in _TEXT if getattr(pipeline, name, None) is not None)]
    for part in parts:
        for layer in _layers(getattr(pipeline, part)):
            for name in _names(part, layer):
                if name in found and found[name][0] != part:
                    taken.add(name)
                found.setdefault(name, (part, layer))
    for name in taken:  # a PEFT name that two text encoders have says nothing; the network has the right of way
        if found[name][0] != component:
            del found[name]
    return found


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) >= 2]


def _names(part: str, layer: str) -> Iterable[str]:
    spelled = [layer]
    if part in _TEXT:  # transformers 5 left out what the names of all files have
        bare = layer.removeprefix("text_model.")
        spelled = [bare, f"text_model.{bare}"]
    for name in spelled:
        yield from (prefix + name for prefix in _DOTTED.get(part, (f"{part}.", "base_model.model.")))
        yield from (prefix + name.replace(".", "_") for prefix in _JOINED[part])


def plain_name(module: str) -> str:
    """A module's name without diffusers' earlier spellings (``attn1.processor.to_out``, ``self_attn.to_q``)."""
    name = module.replace(".processor.", ".")
    head, _, last = name.rpartition(".")
    if last in _ATTENTION and head.endswith("self_attn"):
        return f"{head}.{_ATTENTION[last]}"
    if last == "to_out" and re.search(r"\.attn\d?$", head):
        return f"{name}.0"
    return name


def resolve(pipeline: Any, modules: Iterable[str], table: Mapping[str, Place]) -> dict[str, Place]:
    """``{module: (part, layer)}`` of those modules of a file that are layers of the pipeline."""
    found = {}
    for module in modules:
        place = table.get(plain_name(module)) or table.get(_of_checkpoint(pipeline, module))
        if place is not None:
            found[module] = place
    return found


def _of_checkpoint(pipeline: Any, module: str) -> str:
    """diffusers' name for a U-Net's layer named as in the original checkpoints (``input_blocks.4.1...``); "" if it is none."""
    unet = getattr(pipeline, "unet", None)
    name = re.sub(r"^(lora_unet_|diffusion_model\.|model\.diffusion_model\.)", "", module)
    if unet is None or name == module:
        return ""
    joined = "lora_unet_" + name.replace(".", "_")
    # diffusers' converter renames tensors; what they hold does not matter, so that LoHa and LoKr are renamed as well.
    renamed = {f"{joined}.{side}.weight": torch.zeros(1, 1) for side in ("lora_down", "lora_up")}
    try:
        with quiet():
            made, _ = pipeline.lora_state_dict(renamed, unet_config=unet.config)
        (entry,), _ = entries(made)
    except Exception:  # a name that it does not know ends in whatever its string arithmetic raises
        return ""
    return plain_name(entry)


def converted(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's LoRA whose layers the trainer had joined (FLUX's ``qkv``) or named otherwise, by diffusers' converter.

    Raises:
        Exception: whatever diffusers raises on what it does not know.
    """
    made = {}
    for key, tensor in tensors.items():  # ComfyUI's names as kohya's, which the converter knows
        joined = re.fullmatch(r"diffusion_model\.(.+?)\.(lora_[AB]|lora_down|lora_up|alpha)(\.weight)?", key)
        if joined:
            side = {"lora_A": "lora_down", "lora_B": "lora_up"}.get(joined[2], joined[2])
            key = f"lora_unet_{joined[1].replace('.', '_')}.{side}{joined[3] or ''}"
        made[key] = tensor
    with quiet():
        found = pipeline.lora_state_dict(made)
    return dict(found[0] if isinstance(found, tuple) else found)
