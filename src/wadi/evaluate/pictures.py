"""Pictures to be judged, one at a time: out of a folder, a tensor or an iterator, as 8-bit RGB of one size.

Files are read by `wadi.io.images`, as everywhere in the package: upright, transparency on white, 16-bit grey scaled.

With ``size`` a picture is cropped to its central square and brought to ``size`` x ``size`` by Pillow's Lanczos filter, which
is antialiased. Without, every picture of a set must have the same size already.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import read_image, to_rgb
from wadi.io.regular import read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FITTING = "central square, Lanczos (Pillow)"


def files_in(folder: str | Path) -> list[Path]:
    """The image files in a folder and below, linked folders included, in the natural order of their paths: 2 before 10.

    Raises:
        WadiError: if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WadiError(f"{str(folder)!r} is no folder. Expected a folder of pictures: check the path.")
    found = sorted((natural(path.relative_to(folder).as_posix()), path) for path in _below(folder, ()))
    if not found:
        raise WadiError(f"Folder {str(folder)!r} holds no picture. Expected files named {', '.join(SUFFIXES)}: check the path.")
    return [path for _, path in found]


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key by which digits count as a number; names that differ in leading zeros alone keep the order of their letters."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if part.isdecimal() else -1, "" if part.isdecimal() else part) for part in parts], name


def _below(folder: Path, entered: tuple[str, ...]) -> Iterator[Path]:
    """Image files at any depth, without hidden names; a folder that is linked into itself is entered once."""
    place = os.path.realpath(folder)
    if place in entered:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path, (*entered, place))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def content_digest(files: Iterable[Path]) -> str:
    """Hex digest of the content of files in their order, whatever they are called."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(read_bytes(path, what="Image")).digest())
    return digest.hexdigest()


def fit(picture: Image.Image, size: int) -> Image.Image:
    """The central square at ``size`` x ``size``; pixels are left as they are if it has that size."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = picture if width == height else picture.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def from_tensor(image: Tensor) -> Image.Image:
    """``(3, H, W)``, uint8 or float in [0, 1], to RGB; floats are rounded as diffusers rounds.

    Raises:
        WadiError: on another shape, dtype or range, or values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise WadiError(f"Received an image tensor of shape {tuple(image.shape)}. Expected (3, height, width).")
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise WadiError(f"Received an image tensor of {image.dtype}. Expected uint8, or floats in [0, 1].")
        image = image.detach().float()
        if not bool(((image >= 0) & (image <= 1)).all()):  # NaN fails both
            raise WadiError("Received an image tensor with values outside [0, 1] or not finite. Expected floats in [0, 1].")
        image = (image * 255).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def stream(source: Any) -> Iterator[Image.Image]:
    """Pictures of a folder, a list of files, a tensor ``(N, 3, H, W)``, or an iterable of paths, pictures and tensors.

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
            raise WadiError(f"Received a {type(item).__name__} among images. Expected paths, PIL pictures or tensors.")


def prepared(source: Any, size: int | None) -> Iterator[Image.Image]:
    """`stream`, every picture of one size.

    Raises:
        WadiError: as `stream`; without ``size`` also on a picture of another size than the first.
    """
    first: tuple[int, int] | None = None
    for index, picture in enumerate(stream(source)):
        if size is not None:
            yield fit(picture, size)
            continue
        first = first or picture.size
        if picture.size != first:
            raise WadiError(
                f"Picture {index} is {picture.size[0]} x {picture.size[1]}, the first one {first[0]} x {first[1]}. Expected "
                "one size: give --size, to which each is cropped and resized."
            )
        yield picture


def batches(source: Any, size: int | None, batch: int) -> Iterator[list[Image.Image]]:
    """`prepared` in lists of ``batch``, the last one perhaps shorter: no more than a batch is in memory."""
    part: list[Image.Image] = []
    for picture in prepared(source, size):
        part.append(picture)
        if len(part) == batch:
            yield part
            part = []
    if part:
        yield part
