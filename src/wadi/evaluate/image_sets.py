"""Images to be measured, one at a time: from a folder, a tensor or an iterator, as 8-bit RGB of one size.

`wadi.io.images` reads the files, as everywhere in the package: upright, transparency on white, 16-bit grey scaled.

With ``size`` an image is cropped to its central square and resized to ``size`` x ``size`` by Pillow's Lanczos filter, which is
antialiased. Without it, all images of a set must have the same size.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import read_image, to_rgb
from wadi.io.regular import read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FITTING = "central square, Lanczos (Pillow)"


def files_in(folder: str | Path) -> list[Path]:
    """Return the image files in a folder and below, linked folders included, in the natural order of their paths: 2 before 10.

    Raises:
        WadiError: if the folder does not exist, or contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WadiError(f"{str(folder)!r} is not a folder. Give a folder of images.")
    sorted_files = sorted((natural(path.relative_to(folder).as_posix()), path) for path in _below(folder, ()))
    if not sorted_files:
        raise WadiError(f"Folder {str(folder)!r} contains no image. Image files end in {', '.join(SUFFIXES)}.")
    return [path for _, path in sorted_files]


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that reads digits as a number.

    Names that differ only in leading zeros keep the order of their letters.
    """
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if part.isdecimal() else -1, "" if part.isdecimal() else part) for part in parts], name


def _below(folder: Path, entered: tuple[str, ...]) -> Iterator[Path]:
    """Yield image files at any depth, without hidden names. A folder that is linked into itself is entered once."""
    real_path = os.path.realpath(folder)
    if real_path in entered:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path, (*entered, real_path))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def content_digest(files: Iterable[Path]) -> str:
    """Return the hex digest of the content of files in their order, whatever their names."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(read_bytes(path, what="Image")).digest())
    return digest.hexdigest()


def fit(image: Image.Image, size: int) -> Image.Image:
    """Return the central square at ``size`` x ``size``. Pixels do not change if it has that size."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image if width == height else image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def from_tensor(image: Tensor) -> Image.Image:
    """Convert ``(3, H, W)``, uint8 or float in [0, 1], to RGB. Floats are rounded as diffusers rounds them.

    Raises:
        WadiError: on another shape, dtype or range, or values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise WadiError(f"An image tensor has shape {tuple(image.shape)}. It must have (3, height, width).")
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise WadiError(f"An image tensor has dtype {image.dtype}. Give uint8, or floats in [0, 1].")
        image = image.detach().float()
        if not bool(((image >= 0) & (image <= 1)).all()):  # NaN fails both
            raise WadiError("An image tensor has NaN or values outside [0, 1]. Give floats in [0, 1], or uint8.")
        image = (image * 255).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """Convert RGB to uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stream(source: Any) -> Iterator[Image.Image]:
    """Yield the images of a folder, a list of files, a tensor ``(N, 3, H, W)``, or an iterable of paths, images and tensors.

    Raises:
        WadiError: if an item is none of these, or cannot be read.
    """
    items: Iterable[Any] = files_in(source) if isinstance(source, (str, Path)) else source
    for item in items:
        if isinstance(item, (str, Path)):
            yield read_image(item)
        elif isinstance(item, Image.Image):
            yield to_rgb(item)
        elif isinstance(item, Tensor) and item.ndim == 4:
            yield from map(from_tensor, item)
        elif isinstance(item, Tensor):
            yield from_tensor(item)
        else:
            raise WadiError(f"A {type(item).__name__} is among the images. Give paths, PIL images or tensors.")


def prepared(source: Any, size: int | None) -> Iterator[Image.Image]:
    """Yield the images of `stream`, all of one size.

    Raises:
        WadiError: as `stream`; without ``size``, also if an image has another size than the first.
    """
    first: tuple[int, int] | None = None
    for index, image in enumerate(stream(source)):
        if size is not None:
            yield fit(image, size)
            continue
        first = first or image.size
        if image.size != first:
            raise WadiError(
                f"Image {index} is {image.size[0]} x {image.size[1]}, but the first one is {first[0]} x {first[1]}. Give "
                "--size: each image is then cropped and resized to it."
            )
        yield image


def batches(source: Any, size: int | None, batch: int) -> Iterator[list[Image.Image]]:
    """Yield the images of `prepared` in lists of ``batch``; the last may be shorter. Only one batch is in memory."""
    part: list[Image.Image] = []
    for image in prepared(source, size):
        part.append(image)
        if len(part) == batch:
            yield part
            part = []
    if part:
        yield part
