"""A font for the texts of an image: one that has their glyphs, or the texts written so that they can be read."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
# Fonts of many characters, DejaVu first, which comes with matplotlib; others are tried after them, by name
PREFERRED = (
    "dejavusans", "notosanscjk", "sourcehansans", "pingfang", "hiragino", "msyh", "yahei", "malgun", "wqy",
    "droidsansfallback", "noto",
)  # fmt: skip
PLACEHOLDERS = ("lastresort", "adobeblank")  # fonts that have a box for every character


def readable(texts: Iterable[str], size: float) -> tuple[Font, list[str]]:
    """Return a font and the texts for it: a character without a glyph in any installed font becomes ``\\\\u4e2d``.

    The font is Pillow's own where it has all the glyphs, otherwise the installed one that has most of them.

    Args:
        size: of the font in pixels.
    """
    texts = list(texts)
    default = ImageFont.load_default(size)
    wanted = {ord(character) for text in texts for character in text if not character.isspace()}
    font, glyphs = default, _default_glyphs()
    if wanted - glyphs:
        font, glyphs = _best(wanted, size) or (default, glyphs)
    known = {chr(code) for code in glyphs} | {" ", "\n"}
    return font, ["".join(c if c in known else c.encode("unicode_escape").decode("ascii") for c in text) for text in texts]


def _best(wanted: set[int], size: float) -> tuple[Font, frozenset[int]] | None:
    """The first font with most of ``wanted``, if it has more of it than Pillow's own."""
    best, count = None, len(wanted & _default_glyphs())
    for path in installed():
        glyphs = _glyphs(path)
        if len(wanted & glyphs) > count:
            with suppress(OSError):  # fonts of bitmaps have no other sizes
                best, count = (ImageFont.truetype(path, size), glyphs), len(wanted & glyphs)
        if count == len(wanted):
            break
    return best


@functools.cache
def installed() -> tuple[str, ...]:
    """Files of upright fonts of normal weight, preferred ones first."""
    from matplotlib.font_manager import fontManager

    files = {
        font.fname
        for font in fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal", "regular", "book", "medium")
    }

    def order(file: str) -> tuple[int, str]:
        name = Path(file).stem.lower().replace("-", "").replace("_", "").replace(" ", "")
        return next((place for place, start in enumerate(PREFERRED) if start in name), len(PREFERRED)), name

    return tuple(sorted((f for f in files if not any(name in Path(f).stem.lower() for name in PLACEHOLDERS)), key=order))


@functools.lru_cache(maxsize=1024)
def _glyphs(source: str | bytes) -> frozenset[int]:
    """Code points that a font file, or its bytes, has glyphs for; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(io.BytesIO(source) if isinstance(source, bytes) else source).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def _default_glyphs() -> frozenset[int]:
    font = ImageFont.load_default(12)
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has a font for Latin
        return frozenset(range(0x20, 0x100))
    return _glyphs(font.path.getvalue()) if isinstance(font.path, io.BytesIO) else _glyphs(str(font.path))
