"""Turn images into latents and latents into images, as the config of the autoencoder says.

    latents = (z - shift_factor) scaling_factor                        z: output of the autoencoder's own encoder
    latents = (z - latents_mean) / latents_std  scaling_factor         if the config has a mean and deviation per channel

The factor is 1 where the config has none. Autoencoders of videos get an image as one frame, ``(B, 3, 1, height, width)``.

These are the package's only encoder and decoder; each is the inverse of the other. Some autoencoders overflow in float16 (their
config has ``force_upcast``): they run in float32 and are cast back afterwards. NaN and infinity raise an error: as pixels they
would silently become black or white.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError, short_repr


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch: int = 4) -> Tensor:
    """Return latents ``(N, C, H, W)``, float32, of images ``(N, 3, height, width)`` in ``[0, 1]``, ``batch`` at a time.

    If the autoencoder returns a distribution, its mode is used, so the same image always has the same latents.

    Raises:
        WadiError: if latents contain NaN or infinity.
    """
    with _safe_precision(vae):
        inputs = ((2 * part - 1).to(vae.device, vae.dtype) for part in images.split(batch))  # one batch on the device at a time
        parts = [_image(_mode(vae.encode(_frame(vae, part), return_dict=False)[0])) for part in inputs]
    z = check_finite_rows(torch.cat(parts), "encoder").float()
    mean, std = _moments(vae.config, z)
    return (z - mean) / std * _factor(vae.config)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return images ``(N, 3, height, width)`` in ``[0, 1]``, float32, of latents ``(N, C, H, W)``.

    Gradients flow from the images to the latents, unless the caller turns them off.

    Raises:
        WadiError: if an image contains NaN or infinity.
    """
    latents = latents.float()
    mean, std = _moments(vae.config, latents)
    z = latents * std / _factor(vae.config) + mean
    with _safe_precision(vae):
        images = check_finite_rows(_image(vae.decode(_frame(vae, z.to(vae.dtype)), return_dict=False)[0]), "decoder")
    return (images.float() / 2 + 0.5).clamp(0, 1)


def check_finite_rows(values: Tensor, part: str = "decoder") -> Tensor:
    """Return ``values`` ``(B, ...)``, one row per image, unchanged.

    Args:
        part: the part of the autoencoder that returned them, "decoder" or "encoder".
    Raises:
        WadiError: if a row contains NaN or infinity.
    """
    bad = int((~values.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise WadiError(
            f"The autoencoder's {part} returned NaN or infinity for {bad} of {len(values)} images, in {str(values.dtype)[6:]}. "
            "Use another dtype (bfloat16 or float32) if it is float16, which overflows; otherwise check the weights: adapter, "
            "LoRA, token, control and autoencoder."
        )
    return values


@contextmanager
def finite_decoding(vae: Any) -> Iterator[None]:
    """Make ``vae.decode`` raise `WadiError` for NaN and infinity within the block, also when a pipeline calls it.

    An attribute of the object hides the method of its class. The previous attribute, if any, is restored afterwards.
    """
    inner, previous = vae.decode, vars(vae).get("decode")

    def checked_decode(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        first = output[0]
        if isinstance(first, Tensor) and torch.is_floating_point(first):
            check_finite_rows(first)
        return output

    vae.decode = checked_decode
    try:
        yield
    finally:
        if previous is None:
            del vae.decode
        else:
            vae.decode = previous


def scale_of(config: Mapping[str, Any]) -> int:
    """Return the pixels per latent, along each side, of an autoencoder with this ``config``: each level halves the size.

    Raises:
        WadiError: if the config lists no levels under a name that is known here.
    """
    names = [name for name in ("block_out_channels", "encoder_block_out_channels", "dim_mult") if config.get(name)]
    levels = config[names[0]] if names else config.get("block_out_channels")
    if not isinstance(levels, (list, tuple)) or not 1 <= len(levels) <= 16:
        raise WadiError(
            f"The config of the autoencoder has {short_repr(levels)} under {names[0] if names else 'block_out_channels'!r}. It "
            "must list one to 16 widths: restore the file. If the autoencoder is of another kind, its family must state the "
            "scale (`autoencoder_scale`)."
        )
    return int(2 ** (len(levels) - 1))


def _frame(vae: Any, images: Tensor) -> Tensor:
    """Return images, or latents, as the autoencoder takes them: with an axis of frames if it is one of videos."""
    return images.unsqueeze(2) if any(isinstance(module, nn.Conv3d) for module in vae.modules()) else images


def _image(frames: Tensor) -> Tensor:
    """Return the only frame of ``(B, C, 1, H, W)``; anything else unchanged."""
    return frames.squeeze(2) if frames.ndim == 5 else frames


def _factor(config: Any) -> float:
    return float(config.get("scaling_factor") or 1.0)


def _moments(config: Any, like: Tensor) -> tuple[Any, Any]:
    """Return the mean and deviation of an autoencoder's own latents: per channel, or one number for all."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[key], device=like.device).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return mean, std
    return config.get("shift_factor") or 0.0, 1.0


def _mode(encoded: Any) -> Tensor:
    """Return the most probable latents of a distribution. Latents are returned unchanged."""
    latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()
    return latents


@contextmanager
def _safe_precision(vae: Any) -> Iterator[None]:
    """Run the block with the autoencoder in float32 if it is in float16 and its config says that float16 overflows."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(dtype)
