"""Turn images into latents and latents into images, as the config of the autoencoder says.

    latents = (z - shift_factor) scaling_factor                        z: output of the autoencoder's own encoder
    latents = (z - latents_mean) / latents_std  scaling_factor         if the config has a mean and deviation per channel

FLUX.2's autoencoder keeps mean and deviation in a batch norm, per channel of latents packed 2 x 2: four times the channels,
half the height and width. Autoencoders of videos (with 3-D convolutions) get each image as a video of one frame.

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
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from wadi.errors import WadiError, short_repr

PACKED = 2  # latents of FLUX.2's autoencoder in one, in each direction


@torch.no_grad()
def encode(vae: Any, images: Tensor, batch: int = 4) -> Tensor:
    """Return latents ``(N, C, H, W)``, float32, of images ``(N, 3, height, width)`` in ``[0, 1]``, ``batch`` at a time.

    If the autoencoder returns a distribution, its mode is used, so the same image always has the same latents.

    Raises:
        WadiError: if latents contain NaN or infinity.
    """
    with _safe_precision(vae):
        inputs = ((2 * part - 1).to(vae.device, vae.dtype) for part in images.split(batch))  # one batch on the device at a time
        parts = [_mode(vae.encode(_for(vae, part), return_dict=False)[0]) for part in inputs]
    z = _without_frames(check_finite_rows(torch.cat(parts), "encoder").float())
    z = pixel_unshuffle(z, PACKED) if _packs(vae) else z
    mean, std = _moments(vae, z)
    return (z - mean) / std * _scaling(vae.config)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return images ``(N, 3, height, width)`` in ``[0, 1]``, float32, of latents ``(N, C, H, W)``.

    Gradients flow from the images to the latents, unless the caller turns them off.

    Raises:
        WadiError: if an image contains NaN or infinity.
    """
    latents = latents.float()
    mean, std = _moments(vae, latents)
    z = latents * std / _scaling(vae.config) + mean
    z = pixel_shuffle(z, PACKED) if _packs(vae) else z
    with _safe_precision(vae):
        images = check_finite_rows(vae.decode(_for(vae, z.to(vae.dtype)), return_dict=False)[0], "decoder")
    return (_without_frames(images).float() / 2 + 0.5).clamp(0, 1)


def check_finite_rows(values: Tensor, part: str = "decoder") -> Tensor:
    """Return ``values`` ``(B, ...)``, one row per image, unchanged. In a traced graph, which cannot raise, nothing is checked.

    Args:
        part: the part of the autoencoder that returned them, "decoder" or "encoder".
    Raises:
        WadiError: if a row contains NaN or infinity.
    """
    if torch.compiler.is_compiling():
        return values
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


def _for(vae: Any, images: Tensor) -> Tensor:
    """Return images or latents ``(B, C, H, W)`` as ``vae`` takes them: with one frame, ``(B, C, 1, H, W)``, for videos."""
    return images.unsqueeze(2) if any(isinstance(module, nn.Conv3d) for module in vae.modules()) else images


def _without_frames(images: Tensor) -> Tensor:
    """Return the first frame of videos ``(B, C, frames, H, W)``. Images are returned unchanged."""
    return images[:, :, 0] if images.ndim == 5 else images


def _scaling(config: Any) -> float:
    """Return the factor of the latents: 1 for an autoencoder that has moments alone."""
    return float(config.get("scaling_factor") or 1.0)


def _packs(vae: Any) -> bool:
    """Return whether the latents of ``vae`` are packed 2 x 2, with their moments in a batch norm."""
    return isinstance(getattr(vae, "bn", None), nn.BatchNorm2d)


def _moments(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Return the mean and deviation of an autoencoder's own latents: per channel, or one number for all."""
    config = vae.config
    if _packs(vae):
        mean, variance = (
            moment.float().view(1, -1, 1, 1).to(like.device) for moment in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (variance + config.batch_norm_eps).sqrt()
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
