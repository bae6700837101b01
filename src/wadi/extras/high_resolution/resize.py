"""Generate images larger than a model was trained for, without training it (ScaleCrafter, arXiv 2310.07702).

The convolutions of U-Nets are re-dilated (`redilation`), the positions of transformers are interpolated (`positions`), and the
autoencoder decodes in tiles where a whole image would need several GiB.

    with redilated(pipeline.unet, 2):
        pipeline("red apple", height=1024, width=1024, num_inference_steps=1, guidance_scale=0.0)

Resolutions are ``(height, width)`` in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from wadi.backbones import from_pipeline
from wadi.backbones.base import RESOLUTION
from wadi.errors import WadiError
from wadi.extras.high_resolution.blocks import Blocks, Factor, blocks_in
from wadi.extras.high_resolution.positions import interpolated_positions
from wadi.extras.high_resolution.redilation import redilated

__all__ = [
    "check_resolution",
    "default_factor",
    "enlarged",
    "interpolated_positions",
    "is_large",
    "redilated",
    "set_resolution",
    "tiled_decoding",
]

TILED_ABOVE = 1024 * 1024  # pixels


def check_resolution(pipeline: Any, resolution: tuple[int, int]) -> None:
    """Check that ``pipeline`` can generate at ``resolution``.

    Raises:
        WadiError: unless both sides are multiples of what autoencoder, network and diffusers (8 pixels) need.
    """
    backbone = from_pipeline(pipeline)
    multiple = math.lcm(8, backbone.scale * backbone.patch)
    if any(side < multiple or side % multiple for side in resolution):
        height, width = (max(multiple, round(side / multiple) * multiple) for side in resolution)
        raise WadiError(
            f"The size is {resolution[1]}x{resolution[0]} (width x height). {type(backbone.network).__name__} needs multiples "
            f"of {multiple}: try {width}x{height}."
        )


def set_resolution(pipeline: Any, resolution: tuple[int, int]) -> None:
    """Store in ``pipeline`` that it generates at ``resolution``. `from_pipeline` reads it, as for a student of that size."""
    pipeline.register_to_config(**{RESOLUTION: list(resolution)})


def default_factor(native: tuple[int, int], target: tuple[int, int]) -> float:
    """Return the factor of re-dilation for a size: the growth of the axis that grows less, and at least 1."""
    return max(1.0, min(w / n for w, n in zip(target, native, strict=True)))


def is_large(resolution: tuple[int, int]) -> bool:
    """Return whether the autoencoder works in tiles by default: above a megapixel."""
    return resolution[0] * resolution[1] > TILED_ABOVE


@contextmanager
def tiled_decoding(vae: Any, enabled: bool = True) -> Iterator[None]:
    """Encode and decode tile by tile within the block, if the autoencoder can, so that one tile determines the memory."""
    if not enabled or not hasattr(vae, "enable_tiling"):
        yield
        return
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before


@contextmanager
def enlarged(
    pipeline: Any,
    native: tuple[int, int],
    target: tuple[int, int],
    factor: Factor | None = None,
    blocks: Blocks = None,
    disperse: bool = False,
    tiled: bool | None = None,
) -> Iterator[None]:
    """Let ``pipeline`` generate at resolution ``target`` with the field of view that it has at ``native``, within the block.

    U-Nets and their ControlNets are re-dilated, the positions of transformers are interpolated.

    Args:
        factor: None = `default_factor` for a U-Net. A transformer takes only None, or 1 to leave its positions unchanged.
        blocks, disperse: as `redilated`.
        tiled: decode in tiles; None = above a megapixel.
    Raises:
        WadiError: as `redilated` and `interpolated_positions`, and for options that do not apply to a transformer.
    """
    with ExitStack() as stack:
        stack.enter_context(tiled_decoding(pipeline.vae, is_large(target) if tiled is None else tiled))
        network: Any = getattr(pipeline, "unet", None)
        if network is not None:
            own_factor = default_factor(native, target) if factor is None else factor
            stack.enter_context(redilated(network, own_factor, blocks, disperse))
            for control in _controlnets(pipeline):
                control_blocks = blocks if blocks is None or blocks == "all" else blocks_in(control, blocks)
                stack.enter_context(redilated(control, own_factor, control_blocks, disperse))
        elif blocks is not None or disperse or factor not in (None, 1, 1.0):
            raise WadiError(
                f"{type(pipeline.transformer).__name__} is a transformer, which takes no factor, blocks or dispersion. Leave "
                "them out: its positions are interpolated. A factor of 1 leaves the positions unchanged."
            )
        elif factor is None:
            tokens = [_tokens(pipeline, size) for size in (native, target)]
            for part in (pipeline.transformer, *_controlnets(pipeline)):
                stack.enter_context(interpolated_positions(part, *tokens))
        yield


def _controlnets(pipeline: Any) -> list[Any]:
    """Return the ControlNets of a pipeline, which see the image as its network does."""
    control = getattr(pipeline, "controlnet", None)
    return [] if control is None else list(getattr(control, "nets", [control]))


def _tokens(pipeline: Any, resolution: tuple[int, int]) -> tuple[int, int]:
    """Return ``(height, width)`` in tokens of the transformer."""
    patch = from_pipeline(pipeline).patch
    height, width = (side // (int(pipeline.vae_scale_factor) * patch) for side in resolution)
    return height, width
