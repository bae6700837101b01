"""Read an image file: the only place of the package that does. The same file gives the same pixels to every command.

- Format: one of `FORMATS`, found from the contents, not from the name. Formats that start other programs (EPS) are not read.
- Of an animation, or of a file with several pages, the first image is read.
- The orientation that a camera noted (EXIF) is applied.
- Transparency, also of a palette, is laid on white.
- 16-bit grey is divided by 257, so that white stays white. Of 16-bit colour Pillow keeps the upper 8 bits.
- CMYK and YCbCr are converted by Pillow's formula; colour profiles are not used.
- Images of more than `PIXELS` pixels are refused before they are decoded.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.io.regular import open_regular, shown

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of the images in a folder of a subject or of exemplars
HEIC = (".heic", ".heif")  # of phones, not read
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
PIXELS = 89_478_485  # Pillow warns of a decompression bomb above this number
BYTES = 2**30
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def read_image(path: str | Path, what: str = "Image") -> Image.Image:
    """Return an image file as 8-bit RGB; see the module.

    Args:
        what: names the image at the start of a message, such as ``Condition image``.
    Raises:
        WadiError: if it is not a regular file, not an image, damaged, too large, or its numbers have no known range.
    """
    return to_rgb(open_image(path, what), f"{what} {shown(path)}")


def open_image(source: str | Path | bytes, what: str = "Image") -> Image.Image:
    """Return the decoded first image of a file, or of the bytes of one, upright, in its own mode (see `to_rgb`).

    Raises:
        WadiError: see `read_image`.
    """
    where = f"{what} in memory" if isinstance(source, bytes) else f"{what} {shown(source)}"
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, BYTES, what) as stream:
        start = b""
        try:
            start = stream.read(32)
            stream.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large images and of damaged metadata
                with Image.open(stream, formats=_formats()) as picture:
                    _refuse_large(picture, where)
                    picture.load()
                    return _upright(picture)
        except WadiError:
            raise
        except Image.UnidentifiedImageError as error:
            heic = start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS
            hint = "HEIC is not supported: convert it to JPEG." if heic else "Give a PNG, JPEG or WebP file."
            raise WadiError(f"{where} is not an image in a supported format. {hint}") from error
        except Image.DecompressionBombError as error:
            raise WadiError(f"{where} has too many pixels. At most {PIXELS:,} are read: scale it down.") from error
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise WadiError(f"{where} cannot be read: {reason}. Save it again as PNG or JPEG.") from error


def to_rgb(picture: Image.Image, what: str = "The image") -> Image.Image:
    """Return an image of any mode as 8-bit RGB; see the module. The pixels of an RGB image are unchanged.

    Raises:
        WadiError: if its numbers have no known range (floats, integers beyond 16 bits).
    """
    if picture.mode.startswith("I"):
        return _grey_of_16_bits(picture, what)
    try:
        if picture.mode in _ALPHA or "transparency" in picture.info:
            layer = picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        if picture.mode != "F":
            return picture.convert("RGB")
    except ValueError:  # no conversion from this mode
        pass
    raise _unknown(picture, what)


def is_transparent(picture: Image.Image) -> bool:
    """Return whether a pixel of an image is not opaque."""
    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return False
    layer = picture.convert("LA" if picture.mode == "La" else "RGBA")
    return bool(np.asarray(layer.getchannel("A")).min(initial=255) < 255)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _refuse_large(picture: Image.Image, where: str) -> None:
    width, height = picture.size
    if width * height > PIXELS:
        raise WadiError(
            f"{where} is {width} x {height}, {width * height:,} pixels. At most {PIXELS:,} are read: scale it down."
        )


def _upright(picture: Image.Image) -> Image.Image:
    """A copy of ``picture``, turned as its EXIF data says; damaged EXIF data says nothing."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # it is the user's camera's, in any state, and no part of the image
        return picture.copy()


def _grey_of_16_bits(picture: Image.Image, what: str) -> Image.Image:
    values: Any = np.asarray(picture)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise _unknown(picture, what)
    scaled = (values.astype(np.float64) / 257).round().astype(np.uint8)
    if isinstance(clear := picture.info.get("transparency"), int):
        scaled[values == clear] = 255
    return Image.fromarray(scaled).convert("RGB")


def _unknown(picture: Image.Image, what: str) -> WadiError:
    return WadiError(
        f"{what} has mode {picture.mode!r}, whose numbers have no known range. Scale them to 0..255 and save it as 8-bit PNG."
    )
