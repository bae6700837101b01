"""COCO captions: the rule repeats anywhere, and an incomplete folder is named by its missing file."""

import hashlib
import json
import os

import pytest
from evaluate_toys import coco

from raising import raises_naming
from wadi.evaluate import protocols
from wadi.evaluate.coco import choose, open_coco, read_chosen


@pytest.fixture
def root(tmp_path):
    return coco(tmp_path / "coco")


def test_the_rule_is_that_of_the_docs(root):
    """The first images by sha256 of seed and id, sorted by id, each with the caption of its smallest annotation id."""
    ids = sorted(range(100, 142, 7), key=lambda number: hashlib.sha256(f"3:{number}".encode()).hexdigest())[:4]
    wanted = [(9000 - 10 * ((number - 100) // 7), f"thing {(number - 100) // 7} view 0") for number in sorted(ids)]
    assert choose(open_coco(root, "val2017"), 4, seed=3) == wanted


def test_seeds_choose_differently_and_repeat(root):
    source = open_coco(root, "val2017")
    chosen = {seed: tuple(choose(source, 3, seed)) for seed in range(8)}
    assert chosen[0] == tuple(choose(source, 3, 0))
    assert len(set(chosen.values())) > 1
    with raises_naming("6 images", 7):
        choose(source, 7)


def test_a_list_of_ids_is_taken_in_its_order(root, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("9001\n\n8950\n")
    assert read_chosen(open_coco(root, "val2017"), path) == [(9001, "thing 0 view 1"), (8950, "thing 5 view 0")]


@pytest.mark.parametrize(
    ("text", "values"),
    [("x1\n", ["'x1'"]), ("9001\n5\n", ["line 2", "'5'"]), ("9001\n9001\n", ["line 2", "9001"]), ("\n", [])],
)
def test_bad_ids_are_named(root, tmp_path, text, values):
    path = tmp_path / "ids.txt"
    path.write_text(text)
    with raises_naming(path, *values):
        read_chosen(open_coco(root, "val2017"), path)


def test_missing_files_are_named(root):
    with raises_naming(root, "annotations/captions_val2014.json"):
        open_coco(root, "val2014")
    (root / "val2017" / "000000000107.jpg").unlink()
    (root / "val2017" / "000000000121.jpg").unlink()
    with raises_naming("val2017/000000000107.jpg", "1 more", "6 images"):
        open_coco(root, "val2017")
    for path in (root / "val2017").iterdir():
        path.unlink()
    (root / "val2017").rmdir()
    with raises_naming(root, "val2017/"):
        open_coco(root, "val2017")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [], "annotations": [{"id": 1}]}', '{"images": [{"id": 1}]}'])
def test_a_damaged_captions_file_is_named(root, text):
    (root / "annotations" / "captions_val2017.json").write_text(text)
    with raises_naming(root / "annotations" / "captions_val2017.json"):
        open_coco(root, "val2017")


def test_a_caption_of_an_unknown_image_is_an_error(root):
    path = root / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"] = 5
    path.write_text(json.dumps(content))
    with raises_naming("image 5"):
        open_coco(root, "val2017")


def test_the_protocol_tells_prompts_and_reference(root, tmp_path):
    whole = protocols.coco("coco2017-5k", root, count=6)
    assert whole.size == 256
    assert len(whole.reference) == 6
    other = protocols.coco("coco2017-5k", root, count=5)
    again = protocols.coco("coco2017-5k", root, count=5)
    assert other.settings == again.settings != whole.settings
    path = tmp_path / "ids.txt"
    path.write_text("9000\n")
    named = protocols.coco("coco2017-5k", root, ids=path)
    assert named.prompts == ["thing 0 view 0"]
    assert named.settings["prompts"]["sha256"] != other.settings["prompts"]["sha256"]


def test_the_full_protocol_needs_the_full_split(root):
    with raises_naming("6 images", 5000):
        protocols.coco("coco2017-5k", root)


def test_sets_share_no_seed(root):
    protocol = protocols.coco("coco2017-5k", root, count=6)
    used = [seed for number in range(3) for seed in (*protocol.seeds(number), *protocol.varied_rows(number)[1])]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"images": [{"id": -1, "file_name": "a"}], "annotations": []}', "id"),
        ('{"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": []}', "../a.jpg"),
        ('{"images": [{"id": 1, "file_name": 3}], "annotations": []}', "file_name"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": null}]}', "caption"),
        ('{"images": 3}', "images"),
        ("[" * 100_000, "captions"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "captions"),
    ],
)
def test_hostile_captions_files_are_named(root, content, value):
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(content)
    with raises_naming(path, value):
        open_coco(root, "val2017")
    path.unlink()
    os.mkfifo(path)
    with raises_naming(path):
        open_coco(root, "val2017")


def test_lists_of_ids_are_regular_files_of_numbers(root, tmp_path):
    source = open_coco(root, "val2017")
    (tmp_path / "ids.txt").write_text("²\n")
    with raises_naming(tmp_path / "ids.txt", "²"):
        read_chosen(source, tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("9" * 5000)
    with raises_naming(tmp_path / "ids.txt", "line 1"):
        read_chosen(source, tmp_path / "ids.txt")
    os.mkfifo(tmp_path / "pipe")
    with raises_naming(tmp_path / "pipe"):
        read_chosen(source, tmp_path / "pipe")
