"""Does a control belong to a model? Numbers that both configs state are compared before a step fails deep inside diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wadi.errors import WadiError

# Config entries that a control shares with the network it steers, by the control's class.
SHARED = {
    "ControlNetModel": ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    "SD3ControlNetModel": ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
    "FluxControlNetModel": ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
    "SanaControlNetModel": ("in_channels", "attention_head_dim", "num_attention_heads", "caption_channels"),
}


def refuse_misfit(pipeline: Any, model: Any) -> None:
    """Raise `WadiError`, naming what differs, unless the control was made for networks of the pipeline's shape."""
    network = pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer
    if type(model).__name__ == "T2IAdapter":
        return _refuse_adapter(network.config, model.config, int(pipeline.vae_scale_factor))
    differing = [
        f"{name} {_plain(model.config[name])} where the {type(network).__name__} has {_plain(network.config[name])}"
        for name in SHARED[type(model).__name__]
        if name in model.config and name in network.config and _plain(model.config[name]) != _plain(network.config[name])
    ]
    if type(model).__name__ == "ControlNetModel":
        shrinks, scale = 2 ** (len(model.config.conditioning_embedding_out_channels) - 1), int(pipeline.vae_scale_factor)
        if shrinks != scale:
            differing.append(f"a condition shrunk {shrinks} times where the autoencoder shrinks {scale} times")
    if differing:
        raise WadiError(
            f"The ControlNet is of another family: it has {'; '.join(differing)}. Expected one that was trained for this model "
            "(a ControlNet for SD 1.5 does not fit SD 2.1 or SDXL)."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def wanted_features(config: Mapping[str, Any], pixels: int, scale: int) -> list[tuple[int, int]]:
    """``(channels, side)`` of what `UNet2DConditionModel` adds after each down block for an image of ``pixels`` a side.

    A block with cross-attention adds before it shrinks, any other afterwards.
    """
    side, wanted = pixels // scale, []
    widths: Sequence[int] = config["block_out_channels"]
    for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        after = side if i == len(widths) - 1 else side // 2
        wanted.append((int(width), side if "CrossAttn" in kind else after))
        side = after
    return wanted


def given_features(config: Mapping[str, Any], pixels: int) -> list[tuple[int, int]]:
    """``(channels, side)`` of what a T2I-Adapter of this config makes of an image of ``pixels`` a side."""
    side = pixels // int(config["downscale_factor"])
    shrinking = (2,) if config["adapter_type"] == "full_adapter_xl" else range(1, len(config["channels"]))
    given = []
    for i, width in enumerate(config["channels"]):
        side = side // 2 if i in shrinking else side
        given.append((int(width), side))
    return given


def _refuse_adapter(network: Any, adapter: Any, scale: int) -> None:
    pixels = int(network.sample_size if isinstance(network.sample_size, int) else min(network.sample_size)) * scale
    wanted, given = wanted_features(network, pixels, scale), given_features(adapter, pixels)
    if given[: len(wanted)] != wanted:
        raise WadiError(
            f"The T2I-Adapter is of another family: it makes features (channels, side) {given}, and this model's down blocks "
            f"take {wanted}. Expected one that was trained for this model."
        )
