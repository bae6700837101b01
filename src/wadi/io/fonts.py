"""Choose a font that can show the labels of an image."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
# Fonts with many characters. DejaVu is first: it comes with matplotlib. Other fonts are tried after these, by name.
PREFERRED = (
    "dejavusans", "notosanscjk", "sourcehansans", "pingfang", "hiragino", "msyh", "yahei", "malgun", "wqy",
    "droidsansfallback", "noto",
)  # fmt: skip
PLACEHOLDERS = ("lastresort", "adobeblank")  # fonts that show a box for every character


def choose_font(texts: Iterable[str], size: float) -> tuple[Font, list[str]]:
    """Return a font, and the texts to write with it. A character that the font lacks becomes ``\\\\u4e2d``.

    The font is Pillow's own if it has all the glyphs, otherwise the installed font that has most of them.

    Args:
        size: size of the font in pixels.
    """
    texts = list(texts)
    default = ImageFont.load_default(size)
    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    font, glyphs = default, _default_glyphs()
    if needed - glyphs:
        font, glyphs = _best_font(needed, size) or (default, glyphs)
    available = {chr(code) for code in glyphs} | {" ", "\n"}
    return font, ["".join(c if c in available else c.encode("unicode_escape").decode("ascii") for c in text) for text in texts]


def _best_font(needed: set[int], size: float) -> tuple[Font, frozenset[int]] | None:
    """Return the first font with most of the ``needed`` code points, and its glyphs; None if Pillow's own has as many."""
    best, count = None, len(needed & _default_glyphs())
    for path in installed_fonts():
        glyphs = _glyphs(path)
        if len(needed & glyphs) > count:
            with suppress(OSError):  # a bitmap font does not exist in every size
                best, count = (ImageFont.truetype(path, size), glyphs), len(needed & glyphs)
        if count == len(needed):
            break
    return best


@functools.cache
def installed_fonts() -> tuple[str, ...]:
    """Return the files of upright fonts of normal weight, preferred ones first."""
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
    """Return the code points that a font file (or its bytes) has glyphs for; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(io.BytesIO(source) if isinstance(source, bytes) else source).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def _default_glyphs() -> frozenset[int]:
    font = ImageFont.load_default(12)
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has a Latin font only
        return frozenset(range(0x20, 0x100))
    return _glyphs(font.path.getvalue()) if isinstance(font.path, io.BytesIO) else _glyphs(str(font.path))
