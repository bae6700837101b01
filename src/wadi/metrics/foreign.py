"""Rename the tensors of published checkpoints to transformers' names, so that they load without the authors' own packages.

Each function is pure: from one flat state dict to another. The tests run both kinds of network on random weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from wadi.errors import WadiError

State = dict[str, Tensor]

_OPENCLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPENCLIP = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLIP_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def openclip(state: Mapping[str, Tensor]) -> State:
    """Return an open_clip model with a ViT as the state dict of a ``CLIPModel``.

    The fused ``attn.in_proj`` is cut into q, k and v. The two projections are transposed, because open_clip multiplies by them
    from the right. The causal mask ``attn_mask`` is left out.

    Raises:
        WadiError: on a tensor that such a model does not have.
    """
    renamed: State = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name in _OPENCLIP:
            renamed[_OPENCLIP[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name):
            tower = "vision_model" if block[1] else "text_model"
            renamed |= _openclip_block(f"{tower}.encoder.layers.{block[2]}", block[3], block[4], tensor, name)
        elif name != "attn_mask":
            raise _unknown(name, "an open_clip model of the ViT kind")
    return renamed


def _openclip_block(layer: str, part: str, kind: str, tensor: Tensor, name: str) -> State:
    if part == "attn.in_proj":
        return {
            f"{layer}.self_attn.{p}_proj.{kind}": piece.contiguous() for p, piece in zip("qkv", tensor.chunk(3), strict=True)
        }
    if part not in _OPENCLIP_BLOCK:
        raise _unknown(name, "an open_clip model of the ViT kind")
    return {f"{layer}.{_OPENCLIP_BLOCK[part]}.{kind}": tensor}


def image_reward(state: Mapping[str, Tensor]) -> tuple[State, State, State]:
    """Return ImageReward's checkpoint as state dicts of a ``BlipVisionModel``, a ``BlipTextModel`` and the head (``layers.N``).

    BLIP's two projections, which ImageReward does not use, and the table of positions are left out.

    Raises:
        WadiError: on a tensor that ImageReward does not have.
    """
    vision: State = {}
    text: State = {}
    head: State = {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            vision[_blip_vision(name.removeprefix("blip.visual_encoder."))] = tensor
        elif name.startswith("blip.text_encoder."):
            if not name.endswith("position_ids"):
                text[name.removeprefix("blip.text_encoder.")] = tensor
        elif name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = tensor
        elif not name.startswith(("blip.vision_proj.", "blip.text_proj.")):
            raise _unknown(name, "ImageReward")
    return vision, text, head


def _blip_vision(name: str) -> str:
    for pattern, replacement in _BLIP_VISION:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise _unknown(name, "BLIP's vision transformer")


def _unknown(name: str, what: str) -> WadiError:
    return WadiError(f"The checkpoint contains a tensor {name!r}, which {what} does not have. Give the published weights.")
