"""Read image files. This is the only reader of images in the package, so every command sees the same pixels.

- The format is detected from the contents, not from the name. It must be one of `FORMATS`. Formats that start other programs
  (EPS) are not read.
- If a file has several images (an animation, pages), the first one is read.
- The orientation in a camera's EXIF data is applied.
- Transparent pixels, also in a palette, become white.
- 16-bit grey is divided by 257, so that white stays white. For 16-bit colour Pillow keeps the upper 8 bits.
- CMYK and YCbCr are converted with Pillow's formula. Colour profiles are not used.
- An image of more than `PIXELS` pixels raises an error before it is decoded.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.io.regular import open_regular, quoted

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # for the images of a subject or of exemplars in a folder
HEIC = (".heic", ".heif")  # images of phones; not read
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
PIXELS = 89_478_485  # above this number Pillow warns about a decompression bomb
BYTES = 2**30
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def read_image(path: str | Path, what: str = "Image") -> Image.Image:
    """Return an image file as 8-bit RGB, by the rules of the module.

    Args:
        what: name of the image at the start of a message, such as ``Condition image``.
    Raises:
        WadiError: if it is not a regular file, not an image, damaged, too large, or its numbers have an unknown range.
    """
    return to_rgb(open_image(path, what), f"{what} {quoted(path)}")


def open_image(source: str | Path | bytes, what: str = "Image") -> Image.Image:
    """Return the first image of a file (or of the bytes of a file), decoded and upright, in its own mode (see `to_rgb`).

    Raises:
        WadiError: see `read_image`.
    """
    where = f"{what} in memory" if isinstance(source, bytes) else f"{what} {quoted(source)}"
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, BYTES, what) as stream:
        start = b""
        try:
            start = stream.read(32)
            stream.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about large images and damaged metadata
                with Image.open(stream, formats=_formats()) as image:
                    _check_pixels(image, where)
                    image.load()
                    return _upright(image)
        except WadiError:
            raise
        except Image.UnidentifiedImageError as error:
            heic = start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS
            hint = "HEIC is not supported: convert it to JPEG." if heic else "Give a PNG, JPEG or WebP file."
            raise WadiError(f"{where} is not an image in a supported format. {hint}") from error
        except Image.DecompressionBombError as error:
            raise WadiError(f"{where} has too many pixels. The limit is {PIXELS:,}: scale it down.") from error
        except Exception as error:  # decoders raise all types of errors for damaged files
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise WadiError(f"{where} cannot be read: {reason}. Save it again as PNG or JPEG.") from error


def to_rgb(image: Image.Image, what: str = "The image") -> Image.Image:
    """Return an image of any mode as 8-bit RGB, by the rules of the module. An RGB image keeps its pixels.

    Raises:
        WadiError: if its numbers have an unknown range (floats, integers beyond 16 bits).
    """
    if image.mode.startswith("I"):
        return _grey_of_16_bits(image, what)
    try:
        if image.mode in _ALPHA or "transparency" in image.info:
            layer = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        if image.mode != "F":
            return image.convert("RGB")
    except ValueError:  # no conversion from this mode
        pass
    raise _unknown(image, what)


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image has pixels that are not opaque."""
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return False
    layer = image.convert("LA" if image.mode == "La" else "RGBA")
    return bool(np.asarray(layer.getchannel("A")).min(initial=255) < 255)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_pixels(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > PIXELS:
        raise WadiError(f"{where} is {width} x {height}, {width * height:,} pixels. The limit is {PIXELS:,}: scale it down.")


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy of ``image``, rotated as its EXIF data says. Damaged EXIF data is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data comes from any camera and any program, and may be damaged in any way
        return image.copy()


def _grey_of_16_bits(image: Image.Image, what: str) -> Image.Image:
    values: Any = np.asarray(image)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise _unknown(image, what)
    scaled = (values.astype(np.float64) / 257).round().astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        scaled[values == clear] = 255
    return Image.fromarray(scaled).convert("RGB")


def _unknown(image: Image.Image, what: str) -> WadiError:
    return WadiError(
        f"{what} has mode {image.mode!r}, whose numbers have an unknown range. Scale them to 0..255 and save the image as "
        "8-bit PNG."
    )
