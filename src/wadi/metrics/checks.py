"""What every number about images asks of its input; the messages say how many images there were and how many it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wadi.errors import WadiError

Images = Tensor | Sequence[Tensor]


def rows(features: Tensor, least: int, metric: str) -> Tensor:
    """Features ``(n, d)``, one row per image, in float64.

    Raises:
        WadiError: if they are of another shape, not finite, or fewer than ``least``.
    """
    if features.ndim != 2:
        raise WadiError(f"Received features of shape {tuple(features.shape)}. Expected (images, dimensions).")
    if len(features) < least:
        raise WadiError(f"Received {len(features)} images. The {metric} needs at least {least}: add images.")
    found = features.detach().double()
    bad = (~found.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise WadiError(
            f"{len(bad)} of {len(found)} images have features that are not finite, the first is image {int(bad[0])}. "
            "Expected finite ones: look at that image, or at the precision of the network."
        )
    return found


def pair(first: Tensor, second: Tensor, least: int, metric: str) -> tuple[Tensor, Tensor]:
    """Two sets of features of one space, as `rows`.

    Raises:
        WadiError: also if their dimensions differ.
    """
    if first.ndim == second.ndim == 2 and first.shape[1] != second.shape[1]:
        raise WadiError(
            f"Received features of {first.shape[1]} and of {second.shape[1]} dimensions. Expected both of one network."
        )
    return rows(first, least, metric), rows(second, least, metric)


def as_bytes(images: Images) -> list[Tensor]:
    """Images as uint8 tensors ``(3, h, w)``; floats in [0, 1] are rounded as if they had been saved and read again.

    So a number about pictures in memory is the number about their files.

    Raises:
        WadiError: if one has not three channels, or holds values out of range or not finite.
    """
    return [_as_bytes(image, i) for i, image in enumerate(images)]


def _as_bytes(image: Tensor, index: int) -> Tensor:
    if image.ndim != 3 or len(image) != 3:
        raise WadiError(f"Image {index} has shape {tuple(image.shape)}. Expected (3, height, width): convert it to RGB first.")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise WadiError(f"Image {index} is of {image.dtype}. Expected uint8 in [0, 255] or floats in [0, 1].")
    if not image.isfinite().all():
        raise WadiError(f"Image {index} holds values that are not finite. Expected uint8 in [0, 255] or floats in [0, 1].")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise WadiError(
            f"Image {index} holds values from {low:.4g} to {high:.4g}. Expected uint8 in [0, 255] or floats in [0, 1]."
        )
    return (image.detach().float() * 255).round().byte()
