"""Make a ControlNet from a U-Net, and run a U-Net under one.

`controlnet_of` copies the U-Net's encoder (Zhang et al. 2023). With ``slim`` the copy has neither attention nor text, which
leaves 2.6 M parameters for the embedded teacher. `controlled` steers every call of the U-Net, whatever code makes the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError

WIDTHS = (16, 32, 96, 256)  # of the layers that shrink the condition image, each to half the size of the one before


def controlnet_of(unet: Any, scale: int, slim: bool = False) -> Any:
    """Return an untrained ``ControlNetModel`` for ``unet``, whose residuals are zero; see `copy_into` for its weights.

    Args:
        scale: pixels per latent, a power of two: it says how often the condition image is halved.
        slim: leave attention and text out of the ControlNet (the U-Net keeps its own).
    Raises:
        WadiError: if ``scale`` is not a power of two up to 8.
    """
    from diffusers import ControlNetModel

    halvings = scale.bit_length() - 1
    if 2**halvings != scale or halvings >= len(WIDTHS):
        raise WadiError(f"The autoencoder shrinks images {scale} times. A ControlNet can be made for 1, 2, 4 or 8 times only.")
    parameters = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in parameters}
    config["conditioning_embedding_out_channels"] = WIDTHS[: halvings + 1]
    if slim:
        config["down_block_types"] = ("DownBlock2D",) * len(unet.config.block_out_channels)
        config |= {"mid_block_type": "UNetMidBlock2D", "addition_embed_type": None, "encoder_hid_dim_type": None}
        config["encoder_hid_dim"] = None
    controlnet: Any = ControlNetModel(**config)
    copy_into(controlnet, unet)
    return controlnet


@torch.no_grad()
def copy_into(controlnet: nn.Module, unet: nn.Module) -> int:
    """Copy the U-Net's weights to the ControlNet's weights of the same name, and return the number of tensors copied.

    Where the ControlNet's tensor is larger (its time embedding is always four times the first width) the rest is zero, so
    linear layers and convolutions compute the same as in the U-Net.
    """
    source, copied = unet.state_dict(), 0
    for name, target in controlnet.state_dict().items():
        if name.startswith("controlnet_") or name not in source:
            continue
        tensor = source[name]
        if tensor.ndim == target.ndim and all(s <= t for s, t in zip(tensor.shape, target.shape, strict=True)):
            if tensor.shape != target.shape:
                target.zero_()
            target[tuple(slice(side) for side in tensor.shape)] = tensor.to(target.dtype)
            copied += 1
    return copied


@contextmanager
def controlled(unet: nn.Module, controlnet: nn.Module, image: Tensor, strength: float = 1.0) -> Iterator[None]:
    """Steer every call of ``unet`` by ``controlnet`` within the block.

    Args:
        image: conditions ``(B, 3, H, W)`` in ``[0, 1]``. They are repeated if a call has a multiple of ``B`` rows, as with
            guidance.
    """

    def steer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample, t = args[:2]
        repeated = image.to(sample.dtype).repeat(len(sample) // len(image), 1, 1, 1)
        down, mid = controlnet(
            sample,
            t,
            encoder_hidden_states=kwargs["encoder_hidden_states"],
            controlnet_cond=repeated,
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
