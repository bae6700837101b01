"""Folders of exemplars: images and their descriptions are read, and every mistake is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from raising import raises_naming
from wadi.extras.relation.exemplars import read_exemplar_image, read_exemplars

SIZE = (16, 16)


def fill(folder, count=2, texts=None):
    """Write ``count`` images, 00.png and so on, the i-th all of value 40 i, with one description each."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (40 * i,) * 3).save(folder / f"{i:02d}.png")
    texts = [f"thing <R> other {i}" for i in range(count)] if texts is None else texts
    rows = [{"file": f"{i:02d}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "descriptions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def test_images_and_sentences_belong_together(tmp_path):
    folder = fill(tmp_path / "ex", 3, ["a <R> b", ["c <R> d", "d <R> c"], " e <R> "])
    exemplars = read_exemplars(folder, "<R>", SIZE)
    assert exemplars.images.shape == (3, 3, 16, 16)
    assert [round(255 * float(image.mean())) for image in exemplars.images] == [0, 40, 80]
    assert exemplars.sentences == [["a <R> b"], ["c <R> d", "d <R> c"], ["e <R>"]]


def test_the_format_of_reversions_authors_is_read(tmp_path):
    folder = fill(tmp_path / "ex")
    (folder / "descriptions.jsonl").unlink()
    (folder / "text.json").write_text(json.dumps({"00.png": ["cat {} stone", "cat {} rock"], "01.png": ["dog {} wall"]}))
    assert read_exemplars(folder, "<R>", SIZE).sentences == [["cat <R> stone", "cat <R> rock"], ["dog <R> wall"]]


def test_images_of_any_mode_and_size_become_rgb_of_the_models_size(tmp_path):
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    torch.testing.assert_close(read_exemplar_image(tmp_path / "clear.png", SIZE), torch.ones(3, 16, 16))  # laid on white
    for mode in ("L", "P", "1", "LA", "CMYK", "I;16"):
        image = Image.fromarray(np.full((9, 33), 255, np.uint16)) if mode == "I;16" else Image.new(mode, (33, 9), "white")
        suffix = "jpg" if mode == "CMYK" else "png"
        image.save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
        assert read_exemplar_image(tmp_path / f"{mode.replace(';', '')}.{suffix}", (8, 24)).shape == (3, 8, 24)


def test_a_wide_image_is_cropped_not_squeezed(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert float(read_exemplar_image(tmp_path / "wide.png", SIZE).mean()) > 0.98


def _single(folder):
    fill(folder, 1)


def _empty(folder):
    folder.mkdir()


def _no_descriptions(folder):
    (fill(folder) / "descriptions.jsonl").unlink()


def _undescribed(folder):
    fill(folder, 3, ["a <R> b"])


def _missing_image(folder):
    fill(folder, 2, ["a <R> b"] * 3)


def _without_token(folder):
    fill(folder, 2, ["a <R> b", "a on b"])


def _not_json(folder):
    (fill(folder) / "descriptions.jsonl").write_text('{"file": "00.png", "text": "a <R> b"}\nfox on pizza\n')


def _no_text(folder):
    (fill(folder) / "descriptions.jsonl").write_text('{"file": "00.png"}\n')


def _empty_text(folder):
    fill(folder, 2, ["a <R> b", []])


def _not_utf8(folder):
    (fill(folder) / "descriptions.jsonl").write_bytes(b"\xff\xfe\x00")


def _damaged_image(folder):
    (fill(folder) / "01.png").write_bytes((folder / "00.png").read_bytes()[:40])


def _text_for_image(folder):
    (fill(folder) / "01.png").write_text("not an image")


def _missing_folder(folder):
    pass


# (what is wrong with the folder, what the message names)
WRONG = [
    (_missing_folder, ("'{folder}'",)),
    (_empty, ("'{folder}'", "2")),
    (_single, ("'{folder}'", "00.png")),
    (_no_descriptions, ("'{folder}'", "descriptions.jsonl")),
    (_undescribed, ("01.png, 02.png",)),
    (_missing_image, ("02.png",)),
    (_without_token, ("01.png", "'a on b'", "<R>")),
    (_not_json, ("descriptions.jsonl", "2")),
    (_no_text, ("descriptions.jsonl", "1", "text")),
    (_empty_text, ("descriptions.jsonl", "2", "'[]'")),
    (_not_utf8, ("descriptions.jsonl", "UTF-8")),
    (_damaged_image, ("01.png",)),
    (_text_for_image, ("01.png",)),
]


@pytest.mark.parametrize(("spoil", "named"), WRONG, ids=lambda x: getattr(x, "__name__", "").strip("_"))
def test_a_mistake_in_the_folder_is_named(spoil, named, tmp_path):
    folder = tmp_path / "ex"
    spoil(folder)
    with raises_naming(*(value.format(folder=folder) for value in named)):
        read_exemplars(folder, "<R>", SIZE)
