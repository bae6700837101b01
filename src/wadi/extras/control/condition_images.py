"""Condition images as files, PIL images and tensors: mode, size and range."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import PIXELS, is_transparent, to_rgb

RATIO = 0.02  # relative difference between two aspect ratios that are treated as equal


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB; transparent parts become white.

    Raises:
        WadiError: if the range of its numbers is unknown (32-bit floats, integers of more than 16 bits).
    """
    return to_rgb(image, "The condition image")


def finished_condition(image: Image.Image) -> Image.Image:
    """Return an image that is a condition already (edges, a depth map, ...) as 8-bit RGB.

    Raises:
        WadiError: as `as_rgb`, and if the image has transparent pixels. Black and white are both conditions, so no
            background is a safe guess.
    """
    if is_transparent(image):
        raise WadiError(
            "The condition image has transparent pixels. Put it on the background that the network expects (black for edges, "
            "depth and pose) and save it without transparency."
        )
    return as_rgb(image)


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return ``image`` at ``size`` ``(height, width)``, resized if necessary.

    Raises:
        WadiError: if the aspect ratios differ by more than 2 %, or the size is too large.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if height * width > PIXELS:
        raise WadiError(f"The size {width} x {height} has {height * width:,} pixels. Give at most {PIXELS:,}.")
    if abs(image.width * height / (image.height * width) - 1) > RATIO:
        raise WadiError(
            f"The condition image is {image.width} x {image.height}, and the generated image is {width} x {height}. Their "
            "aspect ratios must be equal: crop the condition image, or generate at its size."
        )
    return image.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as ``(1, 3, H, W)`` in ``[0, 1]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def to_image(mask: Tensor) -> Image.Image:
    """Return ``(1, H, W)`` or ``(H, W)``, boolean or in ``[0, 1]``, as an RGB image in which 1 is white."""
    return Image.fromarray((mask.float().reshape(mask.shape[-2:]) * 255).round().byte().cpu().numpy()).convert("RGB")
