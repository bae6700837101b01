"""Names of tensors in the checkpoints of Stable Diffusion 1.x, 2.x and SDXL, which ComfyUI, A1111 and Forge read.

Each function takes the state dict of a diffusers or transformers model and returns the same tensors under the names of the
original training code, in the same order. Prefixes and names are facts of those checkpoints: ``model.diffusion_model.`` for the
U-Net, ``first_stage_model.`` for the autoencoder, and for the text encoders ``cond_stage_model.`` (SD) or
``conditioner.embedders.N.`` (SDXL). OpenCLIP, in SD 2.x and as the second encoder of SDXL, keeps query, key and value in one
matrix, and its text projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip


def unet_tensors(tensors: Mapping[str, Tensor], layers: int, up_attention: Sequence[bool]) -> dict[str, Tensor]:
    """Return the tensors of a U-Net.

    Args:
        layers: ``layers_per_block``, the same for all blocks.
        up_attention: whether each of the ``up_blocks`` has attention.
    Raises:
        KeyError: with a name that these checkpoints do not have.
    """
    return {UNET + _unet_name(name, layers, up_attention): tensor for name, tensor in tensors.items()}


def _unet_name(name: str, layers: int, up_attention: Sequence[bool]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        side, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        number = block * (layers + 1) + index + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
        return f"{place}.0.{_RESNET[rest]}.{leaf}" if kind == "resnets" else f"{place}.1.{rest}.{leaf}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        if found[1] == "attentions":
            return f"middle_block.1.{found[3]}.{leaf}"
        return f"middle_block.{2 * int(found[2])}.{_RESNET[found[3]]}.{leaf}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{leaf}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        block = int(found[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if up_attention[block] else 1}.conv.{leaf}"
    raise KeyError(name)


def vae_tensors(tensors: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Return the tensors of an autoencoder with ``blocks`` down blocks.

    Raises:
        KeyError: with a name that these checkpoints do not have.
    """
    result = {}
    for name, tensor in tensors.items():
        attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0)\.(\w+)", name)
        if attention:
            part = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}[attention[2]]
            new = f"{attention[1]}.mid.attn_1.{part}.{attention[3]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # these are convolutions there
        else:
            new = _vae_name(name, blocks)
        result[VAE + new] = tensor
    return result


def _vae_name(name: str, blocks: int) -> str:
    new = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    new = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", new)
    new = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.block.", new)
    new = re.sub(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.upsample.", new)
    new = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", new)
    new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if "_blocks" in new or "mid_block" in new:
        raise KeyError(name)
    return new


def clip_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of CLIP's text encoder as in SD 1.x and as the first encoder of SDXL, below ``prefix``."""
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def open_clip_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of OpenCLIP's text encoder as in SD 2.x and as the second encoder of SDXL, below ``prefix``.

    Raises:
        KeyError: with a name that these checkpoints do not have.
    """
    result: dict[str, Tensor] = {}
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name in _CLIP_ENDS:
            result[_CLIP_ENDS[name]] = tensor
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.T.contiguous()
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            result[f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}"] = torch.cat(parts)
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name):
            if found[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
                result[f"transformer.resblocks.{found[1]}.{_CLIP_LAYER[found[2]]}.{found[3]}"] = tensor
        else:
            raise KeyError(name)
    return {f"{prefix}model.{name}": tensor for name, tensor in result.items()}
