"""Resizing for feature networks. The filter changes an FID by points, so each filter has a name that goes into the result.

- ``clean``: each channel as float32 through PIL's antialiased bicubic filter, clipped to [0, 255] but not rounded, as
    clean-fid
  does after Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022;
- ``clean-bilinear``, ``clean-lanczos``: the same with PIL's other antialiased filters;
- ``legacy-torch``: bilinear without antialiasing, with pixel centres at ``i + 1/2`` (pytorch-fid);
- ``legacy-tf``: bilinear without antialiasing, with pixel centres at ``i``, as in TensorFlow 1 (the original FID).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError

_PIL = {
    "clean": Image.Resampling.BICUBIC,
    "clean-bilinear": Image.Resampling.BILINEAR,
    "clean-lanczos": Image.Resampling.LANCZOS,
}
FILTERS = (*_PIL, "legacy-torch", "legacy-tf")


def resize(image: Tensor, size: int, filter: str = "clean") -> Tensor:
    """Resize an image ``(3, h, w)`` in [0, 255] to float32 ``(3, size, size)`` on the same scale. The aspect is not kept.

    Raises:
        WadiError: on a filter that is not in ``FILTERS``.
    """
    check_filter(filter)
    if tuple(image.shape[1:]) == (size, size):
        return image.float()
    if filter == "legacy-tf":
        return _tensorflow(image.float(), size)
    if filter == "legacy-torch":
        return F.interpolate(image.float()[None], (size, size), mode="bilinear", align_corners=False)[0].clamp(0, 255)
    channels = image.float().cpu().numpy()
    resized = [Image.fromarray(channel).resize((size, size), _PIL[filter]) for channel in channels]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in resized]).clip(0, 255)).to(image.device)


def check_filter(filter: str) -> None:
    """Raise a WadiError on a name that is not in ``FILTERS``."""
    if filter not in FILTERS:
        raise WadiError(f"Resize filter is {filter!r}. It must be one of {', '.join(FILTERS)}.")


def _tensorflow(image: Tensor, size: int) -> Tensor:
    """Resize as TensorFlow 1: pixel ``i`` of the result is at ``i * old / new`` of the old; the last row and column repeat."""
    for dim in (1, 2):
        old = image.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=image.device) * (old / size)
        low = at.floor().long().clamp(max=old - 1)
        high = (low + 1).clamp(max=old - 1)
        weight = (at - low).view([-1 if d == dim else 1 for d in range(3)])
        before = image.index_select(dim, low)
        image = before + (image.index_select(dim, high) - before) * weight
    return image
