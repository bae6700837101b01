"""Read folders of images: a subject's, or those of a discriminator."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import HEIC, SUFFIXES, read_image
from wadi.io.regular import is_dir, quoted, read_error


def image_paths(folder: Path, what: str) -> list[Path]:
    """Return the images of ``folder``, sorted by name. Other files are left out.

    Args:
        what: name of the folder in messages, such as ``The subject's folder``.
    Raises:
        WadiError: if the folder is missing, cannot be read, has no image, or has a HEIC image, as phones write them.
    """
    if not is_dir(folder):
        raise WadiError(f"{what} {quoted(folder)} is not a folder. Give a folder of images.")
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise read_error(folder, error, what) from error
    if heic := next((path for path in files if path.suffix.lower() in HEIC), None):
        raise WadiError(f"Image {quoted(heic)} is HEIC, which is not read. Convert it to JPEG, or take it out.")
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise WadiError(f"{what} {quoted(folder)} has no image. Put some there, with names that end in {', '.join(SUFFIXES)}.")
    return images


def read_fitted(path: Path, resolution: tuple[int, int]) -> Image.Image:
    """Return an image scaled and cropped about its centre to ``resolution`` ``(height, width)``.

    Raises:
        WadiError: if it cannot be read.
    """
    height, width = resolution
    return ImageOps.fit(read_image(path), (width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as ``(3, height, width)`` in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255
