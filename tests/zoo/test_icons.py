"""From a tarball to sprites: rendered icons, icons that are left out, and errors."""

import torch
from zoo_toys import icon, write_tarball

from raising import raises_naming
from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.recipe import icons


def test_a_sprite_is_cropped_centred_and_premultiplied():
    path = '<path fill="#ff8000" fill-opacity="0.5" d="M1 2h8v4H1z"/>'
    square = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{path}</svg>'
    sprite = torch.from_numpy(icons.rasterise(square)).int()
    side = icons.SIDE
    assert sprite.shape == (4, side, side)
    inside = sprite[:, side // 4 + 2 : -side // 4 - 2, 2:-2]
    assert (inside[3] - 128).abs().max() <= 1  # half transparent from the left edge to the right one
    assert (inside[0] - 128).abs().max() <= 1
    assert (inside[1] - 64).abs().max() <= 1
    assert inside[2].max() == 0
    assert sprite[:, : side // 4 - 1].max() == 0
    assert sprite[:, -side // 4 + 1 :].max() == 0


def test_an_empty_icon_gives_no_sprite():
    assert icons.rasterise('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"></svg>') is None


def test_people_flags_symbols_skin_tones_and_clocks_are_left_out(tmp_path):
    names = ["pizza", "chair", "man-cook", "red-flag", "plus", "ear-medium-skin-tone", "three-oclock", "stray"]
    categories = {
        "Food & Drink": ["pizza"],
        "Objects": ["chair", "ear-medium-skin-tone", "three-oclock"],
        "People & Body": ["man-cook"],
        "Flags": ["red-flag"],
        "Symbols": ["plus"],
    }
    path = write_tarball(tmp_path, "noto", {name: icon(name, 1) for name in names}, categories)
    assert set(icons.read_icons(path)) == {"pizza", "chair"}


def test_a_concept_that_is_an_alias_is_rendered_from_its_parent(tmp_path):
    path = write_tarball(tmp_path, "noto", {"bee": icon("bee", 1)}, aliases={"honeybee": {"parent": "bee"}})
    assert icons.read_icons(path)["honeybee"] == icons.read_icons(path)["bee"]


def test_a_file_that_is_not_a_tarball_is_named(tmp_path):
    path = tmp_path / "iconify-json-noto-1.0.0.tgz"
    path.write_bytes(b"<html>not found</html>")
    with raises_naming(path):
        icons.read_icons(icons.fetch("noto", tmp_path))


def test_without_npm_and_tarballs_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with raises_naming("npm", tmp_path / "npm", "@iconify-json/noto"):
        icons.fetch("noto", tmp_path / "npm")


def test_concepts_are_found_in_every_style_and_missing_ones_named(tmp_path):
    names = [(name, style) for style in STYLES for name in CONCEPTS.values()]
    pixels = torch.zeros(len(names), 4, 2, 2, dtype=torch.uint8)
    sprites = icons.Sprites(pixels, [n for n, _ in names], [s for _, s in names])
    index = sprites.of_concepts()
    assert index.shape == (len(CONCEPTS), len(STYLES))
    for row, icon_name in zip(index.tolist(), CONCEPTS.values(), strict=True):
        assert [names[i] for i in row] == [(icon_name, style) for style in STYLES]
    with raises_naming(names[-1][0]):
        icons.Sprites(pixels[:-1], sprites.icons[:-1], sprites.styles[:-1]).of_concepts()


def test_sprites_come_back_from_disk(tmp_path):
    sprites = icons.Sprites(torch.arange(32, dtype=torch.uint8).reshape(2, 4, 2, 2), ["a", "b"], ["noto", "fluent"])
    icons.save_sprites(tmp_path / "s.safetensors", sprites)
    again = icons.load_sprites(tmp_path / "s.safetensors")
    assert torch.equal(again.pixels, sprites.pixels)
    assert (again.icons, again.styles) == (sprites.icons, sprites.styles)
