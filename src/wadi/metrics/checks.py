"""Check the input of metrics: enough images, finite features, valid pixels. The messages give the counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wadi.errors import WadiError

Images = Tensor | Sequence[Tensor]
_PIXELS = "Give uint8 in [0, 255], or floats in [0, 1]."


def rows(features: Tensor, least: int, metric: str) -> Tensor:
    """Return features ``(n, d)``, one row for each image, in float64.

    Args:
        least: number of images that the metric needs.
        metric: its name, for the message.
    Raises:
        WadiError: if the features have another shape, are not finite, or are fewer than ``least``.
    """
    if features.ndim != 2:
        raise WadiError(f"Features have shape {tuple(features.shape)}. They must have the shape (images, dimensions).")
    if len(features) < least:
        raise WadiError(f"There are {len(features)} images, and the {metric} needs at least {least}. Add images.")
    values = features.detach().double()
    bad = (~values.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise WadiError(
            f"{len(bad)} of {len(values)} images have features with NaN or infinity (first: image {int(bad[0])}). Check that "
            "image, and the precision of the network."
        )
    return values


def pair(first: Tensor, second: Tensor, least: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return two sets of features from one network, each checked by `rows`.

    Raises:
        WadiError: as `rows`, or if their dimensions differ.
    """
    if first.ndim == second.ndim == 2 and first.shape[1] != second.shape[1]:
        raise WadiError(
            f"The two sets of features have {first.shape[1]} and {second.shape[1]} dimensions. Use one network for both."
        )
    return rows(first, least, metric), rows(second, least, metric)


def as_bytes(images: Images) -> list[Tensor]:
    """Return images as uint8 tensors ``(3, h, w)``. Floats in [0, 1] are rounded as if they had been saved and read again.

    So images in memory and their files give the same metric.

    Raises:
        WadiError: if an image does not have three channels, or has values that are out of range or not finite.
    """
    return [_as_bytes(image, i) for i, image in enumerate(images)]


def _as_bytes(image: Tensor, index: int) -> Tensor:
    if image.ndim != 3 or len(image) != 3:
        raise WadiError(f"Image {index} has shape {tuple(image.shape)}. It must have (3, height, width): convert it to RGB.")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise WadiError(f"Image {index} has dtype {image.dtype}. {_PIXELS}")
    if not image.isfinite().all():
        raise WadiError(f"Image {index} contains NaN or infinity. {_PIXELS}")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise WadiError(f"Image {index} has values from {low:.4g} to {high:.4g}. {_PIXELS}")
    return (image.detach().float() * 255).round().byte()
