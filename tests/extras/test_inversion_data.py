"""Exemplar folders: what is read, and what is wrong with one said in a line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from wadi.errors import WadiError
from wadi.extras.relation.data import read_exemplars, read_picture

SIZE = (16, 16)


def fill(folder, count=2, texts=None):
    """A folder of ``count`` pictures, 00.png and so on, the i-th all of value 40 i, with one description each."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (40 * i,) * 3).save(folder / f"{i:02d}.png")
    texts = [f"thing <R> other {i}" for i in range(count)] if texts is None else texts
    rows = [{"file": f"{i:02d}.png", "text": text} for i, text in enumerate(texts)]
    (folder / "descriptions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def test_pictures_and_sentences_belong_together(tmp_path):
    folder = fill(tmp_path / "ex", 3, ["a <R> b", ["c <R> d", "d <R> c"], " e <R> "])
    found = read_exemplars(folder, "<R>", SIZE)
    assert found.pictures.shape == (3, 3, 16, 16)
    assert [round(255 * float(p.mean())) for p in found.pictures] == [0, 40, 80]
    assert found.sentences == [["a <R> b"], ["c <R> d", "d <R> c"], ["e <R>"]]


def test_the_folder_of_the_methods_authors_is_read(tmp_path):
    folder = fill(tmp_path / "ex")
    (folder / "descriptions.jsonl").unlink()
    (folder / "text.json").write_text(json.dumps({"00.png": ["cat {} stone", "cat {} rock"], "01.png": ["dog {} wall"]}))
    assert read_exemplars(folder, "<R>", SIZE).sentences == [["cat <R> stone", "cat <R> rock"], ["dog <R> wall"]]


def test_any_mode_and_size_becomes_what_the_model_takes(tmp_path):
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    torch.testing.assert_close(read_picture(tmp_path / "clear.png", SIZE), torch.ones(3, 16, 16))  # laid on white
    for mode in ("L", "P", "1", "LA", "CMYK", "I;16"):
        picture = Image.fromarray(np.full((9, 33), 255, np.uint16)) if mode == "I;16" else Image.new(mode, (33, 9), "white")
        suffix = "jpg" if mode == "CMYK" else "png"
        picture.save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
        assert read_picture(tmp_path / f"{mode.replace(';', '')}.{suffix}", (8, 24)).shape == (3, 8, 24)


def test_a_wide_picture_loses_its_sides_not_its_shape(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert float(read_picture(tmp_path / "wide.png", SIZE).mean()) > 0.98


def _single(folder):
    fill(folder, 1)


def _empty(folder):
    folder.mkdir()


def _bare(folder):
    (fill(folder) / "descriptions.jsonl").unlink()


def _undescribed(folder):
    fill(folder, 3, ["a <R> b"])


def _lost(folder):
    fill(folder, 2, ["a <R> b"] * 3)


def _without_token(folder):
    fill(folder, 2, ["a <R> b", "a on b"])


def _no_json(folder):
    (fill(folder) / "descriptions.jsonl").write_text('{"file": "00.png", "text": "a <R> b"}\nfox on pizza\n')


def _no_text(folder):
    (fill(folder) / "descriptions.jsonl").write_text('{"file": "00.png"}\n')


def _empty_text(folder):
    fill(folder, 2, ["a <R> b", []])


def _not_utf8(folder):
    (fill(folder) / "descriptions.jsonl").write_bytes(b"\xff\xfe\x00")


def _broken(folder):
    (fill(folder) / "01.png").write_bytes((folder / "00.png").read_bytes()[:40])


def _no_picture(folder):
    (fill(folder) / "01.png").write_text("not a picture")


def _nothing(folder):
    pass


WRONG = [
    (_nothing, "do not exist"),
    (_empty, r"holds no picture.*at least 2"),
    (_single, r"a single picture, 00\.png.*at least 2"),
    (_bare, r"has no descriptions\.jsonl.*fox <R> pizza"),
    (_undescribed, r"no description of 01\.png, 02\.png"),
    (_lost, r"name 02\.png"),
    (_without_token, r"01\.png is 'a on b', without <R>"),
    (_no_json, "line 2 is not JSON"),
    (_no_text, "line 1 is not valid.*text"),
    (_empty_text, "entry 2 is '\\[\\]'.*a sentence"),
    (_not_utf8, "UTF-8"),
    (_broken, r"01\.png'"),
    (_no_picture, r"01\.png'"),
]


@pytest.mark.parametrize(("spoil", "told"), WRONG, ids=lambda x: getattr(x, "__name__", "").strip("_"))
def test_what_is_wrong_is_told(spoil, told, tmp_path):
    spoil(tmp_path / "ex")
    with pytest.raises(WadiError, match=told):
        read_exemplars(tmp_path / "ex", "<R>", SIZE)
