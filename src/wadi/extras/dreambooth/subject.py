"""Read a folder with a few images of one subject."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wadi.io.image_folders import image_paths, read_fitted, to_tensor
from wadi.io.images import read_image

FOLDER = "The subject's folder"


def check_subject(folder: Path) -> None:
    """Raise `WadiError` where `read_subject` would. This needs no model."""
    for path in image_paths(folder, FOLDER):
        read_image(path)


def read_subject(folder: Path, resolution: tuple[int, int]) -> tuple[Tensor, list[Image.Image]]:
    """Read the images of ``folder``, scaled and cropped about their centre to ``resolution`` ``(height, width)``.

    Returns:
        The images as a tensor ``(N, 3, height, width)`` in [0, 1], and as Pillow images.
    Raises:
        WadiError: if there is no image, or one cannot be read; the message names it.
    """
    images = [read_fitted(path, resolution) for path in image_paths(folder, FOLDER)]
    return torch.stack([to_tensor(image) for image in images]), images
