"""Image tensors as pictures: conversion, labelled grids, PNG files written whole."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.fonts import Font, readable

MARGIN = 6  # pixels between cells
INK, PAPER = (40, 40, 46), (255, 255, 255)


def to_pil(image: Tensor) -> Image.Image:
    """``(3, height, width)`` in ``[0, 1]`` to an 8-bit RGB picture, rounded as diffusers rounds."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def png(picture: Image.Image) -> bytes:
    """A picture as PNG bytes."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all.

    Raises:
        WadiError: if the name says that it is something else, or the place cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise WadiError(f"{str(path)!r} is to be a picture. Expected a name that ends in .png: pictures are written as PNG.")
    write_whole(path, png(picture))


def grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], titles: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """A grid of equally sized pictures: a label left of each row, a title above each column.

    Args:
        scale: whole-number enlargement by nearest neighbour, so that small images are shown as they are.
    Raises:
        WadiError: if there is nothing to show.
    """
    if not rows or not rows[0]:
        raise WadiError("A grid needs at least one picture; received none.")
    width, height = (side * scale for side in rows[0][0].size)
    font, texts = readable([*labels, *titles], max(11, min(18, height // 7)))
    labels, titles = texts[: len(labels)], texts[len(labels) :]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = MARGIN * 2 + max((_extent(measure, label, font)[0] for label in labels), default=0)
    wrapped = [_wrap(measure, title, font, width) for title in titles]
    top = MARGIN + max((_extent(measure, text, font)[1] + MARGIN for text in wrapped), default=0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + MARGIN), top + len(rows) * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        draw.multiline_text((left + column * (width + MARGIN), MARGIN), text, INK, font)
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + r * (height + MARGIN)
        draw.multiline_text((MARGIN, y + height // 2 - _extent(draw, label, font)[1] // 2), label, INK, font)
        for column, picture in enumerate(row):
            sheet.paste(
                picture.resize((width, height), Image.Resampling.NEAREST),
                (left + column * (width + MARGIN), y),
            )
    return sheet


def _extent(draw: ImageDraw.ImageDraw, text: str, font: Font) -> tuple[int, int]:
    box = draw.multiline_textbbox((0, 0), text, font)
    return int(box[2]), int(box[3])


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and _extent(draw, f"{lines[-1]} {word}", font)[0] <= width:
            lines[-1] += f" {word}"
        else:
            lines += _broken(draw, word, font, width)
    return "\n".join(lines)


def _broken(draw: ImageDraw.ImageDraw, word: str, font: Font, width: int) -> list[str]:
    """A word in parts that fit: Chinese and Japanese sentences have no spaces."""
    parts = [""]
    for character in word:
        if parts[-1] and _extent(draw, parts[-1] + character, font)[0] > width:
            parts.append("")
        parts[-1] += character
    return parts
