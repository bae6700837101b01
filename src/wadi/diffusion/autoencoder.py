"""Images to latents and back, by what the autoencoder's own config says of its latents.

    latents = (z - shift_factor) scaling_factor                        z: what the autoencoder itself encodes to
    latents = (z - latents_mean) / latents_std  scaling_factor         where the config has moments per channel

The package has this one encoder and this one decoder; each is the inverse of the other. An autoencoder in float16 whose config
has ``force_upcast`` overflows in half precision: it runs in float32 and is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wadi.diffusion import finite


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch: int = 4) -> Tensor:
    """Return latents ``(N, C, H, W)``, float32, of images ``(N, 3, height, width)`` in ``[0, 1]``, ``batch`` at a time.

    An autoencoder that returns a distribution gives its mode: the same image always has the same latents.

    Raises:
        WadiError: if latents contain NaN or infinity.
    """
    with _safe_precision(vae):
        inputs = ((2 * part - 1).to(vae.device, vae.dtype) for part in images.split(batch))  # one batch on the device at a time
        parts = [_mode(vae.encode(part, return_dict=False)[0]) for part in inputs]
    z = finite.check(torch.cat(parts), "encoder").float()
    mean, std = _moments(vae.config, z)
    return (z - mean) / std * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return images ``(N, 3, height, width)`` in ``[0, 1]``, float32, of latents ``(N, C, H, W)``.

    Raises:
        WadiError: if an image contains NaN or infinity.
    """
    latents = latents.float()
    mean, std = _moments(vae.config, latents)
    z = latents * std / vae.config.scaling_factor + mean
    with _safe_precision(vae):
        images = finite.check(vae.decode(z.to(vae.dtype), return_dict=False)[0], "decoder")
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _moments(config: Any, like: Tensor) -> tuple[Any, Any]:
    """Return mean and deviation of an autoencoder's own latents, per channel or for all."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[key], device=like.device).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return mean, std
    return config.get("shift_factor") or 0.0, 1.0


def _mode(encoded: Any) -> Tensor:
    """Return the most probable latents of a distribution; latents themselves unchanged."""
    latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()
    return latents


@contextmanager
def _safe_precision(vae: Any) -> Iterator[None]:
    """Run the block with the autoencoder in float32 if it is in float16 and its config says that this overflows."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(dtype)
