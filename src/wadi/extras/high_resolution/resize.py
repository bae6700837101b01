"""Pictures larger than a model was trained for, without training it (ScaleCrafter, arXiv 2310.07702).

U-Nets are re-dilated (`redilation`), positions of transformers interpolated (`positions`), and
the autoencoder decodes tile by tile where the whole would take several GiB.

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
from wadi.extras.high_resolution.positions import interpolated_positions
from wadi.extras.high_resolution.redilation import Blocks, Factor, growth, present, redilated

__all__ = ["drawable", "enlarged", "growth", "interpolated_positions", "is_large", "redilated", "resize", "tiled_decoding"]

TILED_ABOVE = 1024 * 1024  # pixels


def drawable(pipeline: Any, resolution: tuple[int, int]) -> tuple[int, int]:
    """``resolution``, if ``pipeline`` can draw it.

    Raises:
        WadiError: unless both sides are multiples of what autoencoder, network and diffusers (8 pixels) ask for.
    """
    backbone = from_pipeline(pipeline)
    multiple = math.lcm(8, backbone.scale * backbone.patch)
    if any(side < multiple or side % multiple for side in resolution):
        height, width = (max(multiple, round(side / multiple) * multiple) for side in resolution)
        raise WadiError(
            f"The size asked for is {resolution[1]}x{resolution[0]} (width x height). Expected multiples of {multiple} for "
            f"{type(backbone.network).__name__}: try {width}x{height}."
        )
    return resolution


def resize(pipeline: Any, resolution: tuple[int, int]) -> None:
    """Note in ``pipeline`` that it draws at ``resolution``, as a student of that size does: `from_pipeline` reads it there."""
    pipeline.register_to_config(**{RESOLUTION: list(resolution)})


def is_large(resolution: tuple[int, int]) -> bool:
    """Whether the autoencoder works in tiles unless told otherwise: above a megapixel."""
    return resolution[0] * resolution[1] > TILED_ABOVE


@contextmanager
def tiled_decoding(vae: Any, wanted: bool = True) -> Iterator[None]:
    """Within the block the autoencoder works tile by tile, both ways, where it can: memory stays that of a tile."""
    if not wanted or not hasattr(vae, "enable_tiling"):
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
    wanted: tuple[int, int],
    factor: Factor | None = None,
    blocks: Blocks = None,
    disperse: bool = False,
    tiled: bool | None = None,
) -> Iterator[None]:
    """Within the block ``pipeline`` draws at resolution ``wanted`` with the field of view it has at ``native``.

    U-Nets (and their ControlNets) are re-dilated, positions of transformers interpolated.

    Args:
        factor: None = `growth` for a U-Net; for a transformer only None, or 1 for positions as they are.
        tiled: decode in tiles; None = above a megapixel.
    Raises:
        WadiError: as `redilated` and `interpolated_positions`, and for options that do not apply to a transformer.
    """
    with ExitStack() as stack:
        stack.enter_context(tiled_decoding(pipeline.vae, is_large(wanted) if tiled is None else tiled))
        network: Any = getattr(pipeline, "unet", None)
        if network is not None:
            own = growth(native, wanted) if factor is None else factor
            stack.enter_context(redilated(network, own, blocks, disperse))
            for control in _controls(pipeline):
                theirs = blocks if blocks is None or blocks == "all" else present(control, blocks)
                stack.enter_context(redilated(control, own, theirs, disperse))
        elif blocks is not None or disperse or factor not in (None, 1, 1.0):
            raise WadiError(
                f"{type(pipeline.transformer).__name__} is a transformer. Expected no factor, blocks or dispersion: its "
                "positions are interpolated, or left as they are with a factor of 1."
            )
        elif factor is None:
            tokens = [_tokens(pipeline, size) for size in (native, wanted)]
            for part in (pipeline.transformer, *_controls(pipeline)):
                stack.enter_context(interpolated_positions(part, *tokens))
        yield


def _controls(pipeline: Any) -> list[Any]:
    """The ControlNets of a pipeline, which see the picture as its network does."""
    control = getattr(pipeline, "controlnet", None)
    return [] if control is None else list(getattr(control, "nets", [control]))


def _tokens(pipeline: Any, resolution: tuple[int, int]) -> tuple[int, int]:
    backbone = from_pipeline(pipeline)
    height, width = (side // (backbone.scale * backbone.patch) for side in resolution)
    return height, width
