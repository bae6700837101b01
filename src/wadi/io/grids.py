"""Turn image tensors into PNG files, and images into labelled grids."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.fonts import Font, choose_font

MARGIN = 6  # pixels between cells
SHOWN_WIDTH = 128  # pixels; smaller images are enlarged to about this width
INK, PAPER = (40, 40, 46), (255, 255, 255)


def to_pil(image: Tensor) -> Image.Image:
    """Return a tensor ``(3, height, width)`` in ``[0, 1]`` as an 8-bit RGB image, rounded as diffusers rounds."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def encode_png(image: Image.Image, **options: Any) -> bytes:
    """Return an image as PNG bytes: the smallest file, unless ``options`` of Pillow (``compress_level=3``) say otherwise."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", **(options or {"optimize": True}))
    return stream.getvalue()


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, completely or not at all.

    Raises:
        WadiError: if the name does not end in ``.png``, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise WadiError(f"Images are written as PNG, so {str(path)!r} must end in .png.")
    write_whole(path, encode_png(image))


def enlargement(image: Image.Image) -> int:
    """Return the whole number that brings a small image to a width of about `SHOWN_WIDTH`; 1 for larger ones."""
    return max(1, SHOWN_WIDTH // image.width)


def compose_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], titles: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """Return a grid of images of equal size, with a label left of each row and a title above each column.

    Args:
        scale: enlarge by this whole number with nearest neighbour, so that small images stay sharp.
    Raises:
        WadiError: if it receives no images.
    """
    if not rows or not rows[0]:
        raise WadiError("A grid needs at least one image; it received none.")
    width, height = (side * scale for side in rows[0][0].size)
    font, texts = choose_font([*labels, *titles], max(11, min(18, height // 7)))
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
        for column, image in enumerate(row):
            sheet.paste(
                image.resize((width, height), Image.Resampling.NEAREST),
                (left + column * (width + MARGIN), y),
            )
    return sheet


def _extent(draw: ImageDraw.ImageDraw, text: str, font: Font) -> tuple[int, int]:
    """Return the width and height of a text in pixels."""
    box = draw.multiline_textbbox((0, 0), text, font)
    return int(box[2]), int(box[3])


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """Break a text into lines of at most ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and _extent(draw, f"{lines[-1]} {word}", font)[0] <= width:
            lines[-1] += f" {word}"
        else:
            lines += _split_word(draw, word, font, width)
    return "\n".join(lines)


def _split_word(draw: ImageDraw.ImageDraw, word: str, font: Font, width: int) -> list[str]:
    """Split a word into parts that fit. Chinese and Japanese sentences have no spaces."""
    parts = [""]
    for character in word:
        if parts[-1] and _extent(draw, parts[-1] + character, font)[0] > width:
            parts.append("")
        parts[-1] += character
    return parts
