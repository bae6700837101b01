"""Check that a control was made for a network of the pipeline's shape, by the numbers that both configs state.

Without this check a step would fail deep inside diffusers.
"""

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


def check_control_fits(pipeline: Any, control: Any) -> None:
    """Raise `WadiError`, naming the differences, unless the control was made for networks of the pipeline's shape."""
    network = pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer
    if type(control).__name__ == "T2IAdapter":
        return _check_adapter(network.config, control.config, int(pipeline.vae_scale_factor))
    differences = [
        f"{name} {_plain(control.config[name])} where the {type(network).__name__} has {_plain(network.config[name])}"
        for name in SHARED[type(control).__name__]
        if name in control.config and name in network.config and _plain(control.config[name]) != _plain(network.config[name])
    ]
    if type(control).__name__ == "ControlNetModel":
        shrinks, scale = 2 ** (len(control.config.conditioning_embedding_out_channels) - 1), int(pipeline.vae_scale_factor)
        if shrinks != scale:
            differences.append(f"a condition shrunk {shrinks} times where the autoencoder shrinks {scale} times")
    if differences:
        raise WadiError(
            f"The ControlNet does not fit this model: it has {'; '.join(differences)}. Use one that was trained for this model "
            "(a ControlNet for SD 1.5 does not fit SD 2.1 or SDXL)."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def unet_features(config: Mapping[str, Any], pixels: int, scale: int) -> list[tuple[int, int]]:
    """Return ``(channels, side)`` of the features that `UNet2DConditionModel` adds to, one pair for each down block.

    A block with cross-attention adds before it shrinks, any other block afterwards.

    Args:
        pixels: side of the image.
        scale: pixels per latent.
    """
    side, features = pixels // scale, []
    widths: Sequence[int] = config["block_out_channels"]
    for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        after = side if i == len(widths) - 1 else side // 2
        features.append((int(width), side if "CrossAttn" in kind else after))
        side = after
    return features


def adapter_features(config: Mapping[str, Any], pixels: int) -> list[tuple[int, int]]:
    """Return ``(channels, side)`` of the features that a T2I-Adapter computes from an image of ``pixels`` a side."""
    side = pixels // int(config["downscale_factor"])
    shrinking = (2,) if config["adapter_type"] == "full_adapter_xl" else range(1, len(config["channels"]))
    features = []
    for i, width in enumerate(config["channels"]):
        side = side // 2 if i in shrinking else side
        features.append((int(width), side))
    return features


def _check_adapter(network: Any, adapter: Any, scale: int) -> None:
    pixels = int(network.sample_size if isinstance(network.sample_size, int) else min(network.sample_size)) * scale
    needed, computed = unet_features(network, pixels, scale), adapter_features(adapter, pixels)
    if computed[: len(needed)] != needed:
        raise WadiError(
            f"The T2I-Adapter does not fit this model: its features (channels, side) are {computed}, and the model's down "
            f"blocks take {needed}. Use one that was trained for this model."
        )
