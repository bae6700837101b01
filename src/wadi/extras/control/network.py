"""A ControlNet made from a U-Net, and a U-Net under one.

`controlnet_of` copies the U-Net's encoder (Zhang et al. 2023); ``slim`` leaves its attention and text out, which makes
the embedded teacher's 2.6 M parameters. `controlled` steers any call of the U-Net, through whatever code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError

WIDTHS = (16, 32, 96, 256)  # of the layers that shrink the condition image, each half the size of the one before


def controlnet_of(unet: Any, scale: int, slim: bool = False) -> Any:
    """An untrained ``ControlNetModel`` for ``unet``, whose residuals are zero; see `copy_into` for its weights.

    Args:
        scale: pixels per latent, a power of two: how often the condition image is halved.
        slim: without attention and without text in the ControlNet itself (the U-Net keeps its own).
    Raises:
        WadiError: if ``scale`` is no power of two up to 8.
    """
    from diffusers import ControlNetModel

    halvings = scale.bit_length() - 1
    if 2**halvings != scale or halvings >= len(WIDTHS):
        raise WadiError(f"The autoencoder shrinks {scale} times. Expected 1, 2, 4 or 8: others have no ControlNet here.")
    takes = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in takes}
    config["conditioning_embedding_out_channels"] = WIDTHS[: halvings + 1]
    if slim:
        config["down_block_types"] = ("DownBlock2D",) * len(unet.config.block_out_channels)
        config |= {"mid_block_type": "UNetMidBlock2D", "addition_embed_type": None, "encoder_hid_dim_type": None}
        config["encoder_hid_dim"] = None
    made: Any = ControlNetModel(**config)
    copy_into(made, unet)
    return made


@torch.no_grad()
def copy_into(controlnet: nn.Module, unet: nn.Module) -> int:
    """Copy the U-Net's weights into the ControlNet's of the same name; the number of tensors copied.

    Where the ControlNet's tensor is larger (its time embedding is always four times the first width) the rest is zero, which
    leaves linear layers and convolutions computing the same.
    """
    source, copied = unet.state_dict(), 0
    for name, target in controlnet.state_dict().items():
        if name.startswith("controlnet_") or name not in source:
            continue
        given = source[name]
        if given.ndim == target.ndim and all(g <= t for g, t in zip(given.shape, target.shape, strict=True)):
            if given.shape != target.shape:
                target.zero_()
            target[tuple(slice(side) for side in given.shape)] = given.to(target.dtype)
            copied += 1
    return copied


@contextmanager
def controlled(unet: nn.Module, controlnet: nn.Module, image: Tensor, strength: float = 1.0) -> Iterator[None]:
    """Within the block every call of ``unet`` is steered by ``controlnet``.

    Args:
        image: conditions ``(B, 3, H, W)`` in ``[0, 1]``; repeated where a call has a multiple of ``B`` rows, as guidance has.
    """

    def steer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample, t = args[:2]
        shown = image.to(sample.dtype).repeat(len(sample) // len(image), 1, 1, 1)
        down, mid = controlnet(
            sample,
            t,
            encoder_hidden_states=kwargs["encoder_hidden_states"],
            controlnet_cond=shown,
            conditioning_scale=strength,
            added_cond_kwargs=kwargs.get("added_cond_kwargs"),
            return_dict=False,
        )
        return args, {**kwargs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    handle = unet.register_forward_pre_hook(steer, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
