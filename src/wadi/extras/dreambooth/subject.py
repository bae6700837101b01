"""Read a folder with a few images of one subject."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import HEIC, SUFFIXES, read_image
from wadi.io.regular import is_dir, quoted, read_error


def image_paths(folder: Path) -> list[Path]:
    """Return the images of ``folder``, sorted by name. Other files are left out.

    Raises:
        WadiError: if the folder is missing, cannot be read, has no image, or has a HEIC image, as phones write them.
    """
    if not is_dir(folder):
        raise WadiError(f"The subject {quoted(folder)} is not a folder. Give a folder with a few images of one subject.")
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise read_error(folder, error, "Subject's folder") from error
    if heic := next((path for path in files if path.suffix.lower() in HEIC), None):
        raise WadiError(f"The subject's image {quoted(heic)} is HEIC, which is not read. Convert it to JPEG, or take it out.")
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise WadiError(
            f"The subject's folder {quoted(folder)} has no image. Put a few there, with names that end in "
            f"{', '.join(SUFFIXES)}."
        )
    return images


def check_subject(folder: Path) -> None:
    """Raise `WadiError` where `read_subject` would. This needs no model."""
    for path in image_paths(folder):
        read_image(path)


def read_subject(folder: Path, resolution: tuple[int, int]) -> tuple[Tensor, list[Image.Image]]:
    """Read the images of ``folder``, scaled and cropped about their centre to ``resolution`` ``(height, width)``.

    Returns:
        The images as a tensor ``(N, 3, height, width)`` in [0, 1], and as Pillow images.
    Raises:
        WadiError: if there is no image, or one cannot be read; the message names it.
    """
    height, width = resolution
    images = [ImageOps.fit(read_image(path), (width, height), Image.Resampling.LANCZOS) for path in image_paths(folder)]
    return torch.stack([_to_tensor(image) for image in images]), images


def _to_tensor(image: Image.Image) -> Tensor:
    """Return ``(3, height, width)`` in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255
