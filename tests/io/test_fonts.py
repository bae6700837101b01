"""Titles of grids in any script: written in a font with their glyphs, or escaped; never boxes, never a crash."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from wadi.io import fonts, grids
from wadi.io.fonts import choose_font

ODD = ("\ud800", "\x00", "\u202e", "a\tb", "\U0010ffff", "e\u0301\u0301", "", "\n")


@pytest.fixture
def square_font(tmp_path):
    """A font in which each of three Chinese characters is a black square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def box(left, right):
        pen = TTGlyphPen(None)
        pen.moveTo((left, 0))
        for point in ((left, 800), (right, 800), (right, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({0x4E2D: "square", 0x6587: "square", 0x72AC: "square", ord("a"): "square"})
    builder.setupGlyf({".notdef": box(400, 500), "square": box(50, 950)})
    builder.setupHorizontalMetrics({".notdef": (1000, 400), "square": (1000, 50)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    return str(tmp_path / "squares.ttf")


@pytest.fixture
def installed(monkeypatch):
    def set_to(*files):
        monkeypatch.setattr(fonts, "installed_fonts", lambda: files)

    set_to()
    return set_to


def test_latin_is_drawn_as_before(installed):
    font, texts = choose_font(["red apple", "a [dog], 25 steps"], 14)
    assert texts == ["red apple", "a [dog], 25 steps"]
    assert font.getname() == ImageFont.load_default(14).getname()


def test_european_letters_are_always_there():
    """Pillow's own font lacks them; matplotlib brings one."""
    expected = ["Größe", "яблоко", "μήλο", "jabłko", "± ≤ →"]
    assert choose_font(expected, 14)[1] == expected


def test_a_font_with_the_glyphs_is_chosen(installed, square_font, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed(str(tmp_path / "broken.ttf"), str(tmp_path / "gone.ttf"), square_font)
    font, texts = choose_font(["中文犬", "a"], 14)
    assert font.getname() == ("Squares", "Regular")
    assert texts == ["中文犬", "a"]
    grid = grids.compose_grid([[Image.new("RGB", (60, 20), "red")]], ["a"], ["中文犬"])
    ink = (np.asarray(grid).max(2) < 100)[:20].sum()
    assert ink > 3 * 60  # three filled squares of 11 pixels, not the narrow bars of missing glyphs


def test_without_such_a_font_characters_are_named(installed):
    font, texts = choose_font(["a 中文 dog", "ok"], 14)
    assert texts == ["a \\u4e2d\\u6587 dog", "ok"]
    assert font.getname() == ImageFont.load_default(14).getname()


def test_what_the_best_font_lacks_is_named(installed, square_font):
    installed(square_font)
    assert choose_font(["中文犬鬼"], 14)[1] == ["中文犬\\u9b3c"]


def test_no_text_crashes_a_grid(installed):
    picture = Image.new("RGB", (16, 16))
    for text in ODD:
        grids.compose_grid([[picture]], [text], [text])


def test_what_is_installed_is_upright_and_exists():
    for file in fonts.installed_fonts():
        assert "italic" not in file.lower()


@pytest.mark.parametrize("word", ["中" * 40, "w" * 60])
def test_a_word_longer_than_its_column_goes_on_below(installed, square_font, word):
    """Chinese has no spaces: the title of one column does not run into the next."""
    installed(square_font)
    rows = [[Image.new("RGB", (40, 40), "white")] * 2]
    pixels = np.asarray(grids.compose_grid(rows, [""], [word, ""]))
    start = pixels.shape[1] - 40 - grids.MARGIN
    assert (pixels[:, start:] == 255).all()
    assert (pixels[:, : start - grids.MARGIN] < 255).any()
