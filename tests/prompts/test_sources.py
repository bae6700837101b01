"""Every file format gives the same prompts, and an error is one line."""

import csv
import json
import os
import sys

import pytest

from raising import raises_naming
from wadi.errors import WadiError
from wadi.prompts import sources
from wadi.prompts.reading import LONGEST, Prompts, open_prompts, read_prompts

PROMPTS = ["red apple", 'a "quoted", comma', "two\nlines", "ночь", "red apple"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


WRITERS = {
    "jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet, "tsv": lambda path, rows: write_csv(path, rows, "\t"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("field", ["prompt", "words"])
def test_every_format_gives_the_same_prompts(kind, field, tmp_path):
    """In order, duplicates kept, rows without a prompt left out and counted."""
    rows = [{"id": str(i), field: text} for i, text in enumerate([*PROMPTS[:2], "", "  ", *PROMPTS[2:]])]
    path = WRITERS[kind](tmp_path / f"p.{kind}", rows)
    found = open_prompts(path, None if field == "prompt" else field)
    assert list(found) == PROMPTS
    assert found.left_out == 2
    assert found.digest == Prompts(iter(PROMPTS)).digest
    assert list(open_prompts(path, field, limit=2)) == PROMPTS[:2]


def test_a_data_set_by_name_is_streamed(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"id": str(i), "caption": text, "picture": "x" * 99} for i, text in enumerate(PROMPTS)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert list(open_prompts(f"hf://{tmp_path}")) == PROMPTS
    assert list(open_prompts(f"hf://{tmp_path}?split=train", "id")) == list("01234")
    for source, field in ((f"hf://{tmp_path}?split=nonsense", None), (f"hf://{tmp_path}", "nonsense")):
        with pytest.raises(WadiError, match="nonsense"):
            open_prompts(source, field)
    with raises_naming("hf://nobody/nothing-of-this-name"):
        open_prompts("hf://nobody/nothing-of-this-name")
    with pytest.raises(WadiError, match="shuffle"):
        open_prompts(f"hf://{tmp_path}?shuffle=1")


@pytest.mark.parametrize(
    ("module", "source", "extra"), [("pyarrow.parquet", "p.parquet", "data"), ("datasets", "hf://a/b", "datasets")]
)
def test_a_missing_library_is_named(module, source, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with raises_naming(f"wadi-onestep[{extra}]"):
        open_prompts(source)


def test_annotations_of_journeydb(tmp_path):
    """The caption is nested; records that were not captioned have none."""
    record = {"img_path": "./000/a.jpg", "prompt": "cat --v 5", "Task2": {"Caption": "A cat."}}
    path = write_jsonl(tmp_path / "train_anno.jsonl", [record, {"img_path": "b.jpg", "prompt": "dog", "Task2": None}, record])
    found = open_prompts(path)
    assert (list(found), found.left_out) == (["A cat.", "A cat."], 1)
    assert list(open_prompts(path, "prompt")) == ["cat --v 5", "dog", "cat --v 5"]


def test_patterns_read_files_by_name_of_mixed_formats(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two\n")
    (tmp_path / "a.txt").write_text("one\n")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "three"}])
    (tmp_path / "[odd].txt").write_text("odd\n")
    assert read_prompts(tmp_path / "**" / "*.[jt]*") == ["odd", "one", "three", "two"]
    assert read_prompts(tmp_path / "[odd].txt") == ["odd"]  # a name that is there is no pattern
    with raises_naming("nothing*"):
        read_prompts(tmp_path / "nothing*")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hf"])
def test_of_several_captions_the_first_is_used_and_what_is_left_out_is_counted(kind, tmp_path, capsys):
    captions = [["a cat", "a kitten"], [], ["", "a dog"], ["a bird"], None]
    if kind in ("json", "jsonl"):  # only there may a row be a string among lists
        captions = ["a fox", *captions, 5]
    rows = [{"caption": value} for value in captions]
    if kind == "parquet":
        path = write_parquet(tmp_path / "p.parquet", rows)
    elif kind == "json":
        path = tmp_path / "p.json"
        path.write_text(json.dumps(rows, indent=1))
    else:
        path = write_jsonl(tmp_path / "p.jsonl", rows)
    if kind == "hf":
        pytest.importorskip("datasets")
    found = open_prompts(f"hf://{tmp_path}" if kind == "hf" else path)
    expected = ["a cat", "a dog", "a bird"]
    mixed = kind in ("json", "jsonl")
    assert list(found) == (["a fox", *expected] if mixed else expected)
    assert (found.left_out, found.several) == (3 if mixed else 2, 1)
    message = capsys.readouterr().err
    assert f"{found.left_out} rows" in message
    assert "1 rows" in message
    assert "first" in message


@pytest.mark.parametrize("indent", [None, 1])
def test_captions_of_coco(indent, tmp_path):
    path = tmp_path / "captions_val2017.json"
    annotations = [{"image_id": 9 - i, "id": i, "caption": text} for i, text in enumerate(PROMPTS)]
    content = {"info": {"year": 2017}, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": annotations}
    path.write_text(json.dumps(content, indent=indent))
    assert list(open_prompts(path)) == PROMPTS


def test_a_json_document_is_read_like_lines(tmp_path):
    path = tmp_path / "p.json"
    for content in (json.dumps(PROMPTS), json.dumps(PROMPTS, indent=2), "\n".join(map(json.dumps, PROMPTS))):
        path.write_text(content)
        assert list(open_prompts(path)) == PROMPTS
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert list(open_prompts(path)) == ["one", "two"]
    path.write_text('{"prompt": "one"}')
    assert list(open_prompts(path)) == ["one"]


def test_weights_of_words_are_literal(tmp_path):
    (tmp_path / "p.txt").write_text("a (red:1.3) cat\n")
    assert read_prompts(tmp_path / "p.txt") == ["a (red:1.3) cat"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(suffix, tmp_path):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / f"p.{suffix}")
    with raises_naming(f"p.{suffix}", "pipe"):
        open_prompts(tmp_path / f"p.{suffix}")


def test_half_a_surrogate_pair_is_an_error_wherever_it_comes_from(monkeypatch):
    monkeypatch.setattr("wadi.prompts.reading.rows_of", lambda *_: iter([("'x' row 7", "a \ud800 cat")]))
    with pytest.raises(WadiError, match="row 7"):
        open_prompts("x")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b'{"a": 1}\n{"b": 2}\n', ("--prompts-field", "fields are a")),
        ("p.jsonl", b'{"prompt": "x"}\n[1]\n', ("line 2", "list")),
        ("p.jsonl", b'{"prompt": "x"}\n{"pro\n', ("line 2", "not json")),
        ("p.jsonl", b'{"prompt": "x\xff"}\n', ("utf-8", "line 1")),
        ("p.csv", b"a,b\n1,2\n", ("fields are a, b",)),
        ("p.csv", b"", ()),
        ("p.parquet", b"PAR1 or not", ("parquet",)),
        ("p.txt", b"fine\n\xff\n", ("utf-8", "line 2")),
        ("p.txt", b"fine\n" + b"x" * 2**20, ("1,048,576 characters", "line 2", f"{LONGEST:,}")),
        ("p.jsonl", b'{"prompt": null}\n', ("prompt",)),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": "\\ud800"}\n', ("line 2", "ud800")),
        ("p.jsonl", b"[" * 100_000, ("line 1", "nested")),
        ("p.jsonl", b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", ("line 1", "digits")),
        ("p.json", b'[{"prompt": "x"}, 5]', ("row 2", "int")),
        ("p.json", b'[{"prompt": "x"}', ("not json", "line 1")),
        ("p.json", b'{"a": 1}', ("fields are a",)),
        ("p.txt", "caf\u00e9".encode("latin-1"), ("line 1", "byte 4", "0xe9", "iconv")),
        ("p.txt", b"fine\n\ncaf\xe9\n", ("line 3", "byte 4", "0xe9")),
        ("p.txt", "two words".encode("utf-16"), ("utf-16", "iconv")),
        ("p.csv", "prompt\na\n".encode("utf-16"), ("utf-16",)),
        ("p.pkl", b"\x80\x04N.", ("pickle", "never loaded")),
        ("p.jsonl.gz", b"\x1f\x8b", ("compressed",)),
    ],
)
def test_an_error_names_the_place_and_the_value(name, content, words, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WadiError) as caught:
        open_prompts(tmp_path / name)
    assert all(word in str(caught.value).lower() for word in (*words, name))
    assert "\n" not in str(caught.value)


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    (tmp_path / "p.txt").write_text("x" * 5000)
    with raises_naming("p.txt", "line 1", "1,000"):
        open_prompts(tmp_path / "p.txt")


def test_texts_are_on_disk_and_read_at_random(tmp_path):
    """8 bytes per prompt are in memory, however long the prompt."""
    path = tmp_path / "p.txt"
    path.write_text("".join(f"{i} {'x' * 500}\n" for i in range(20_000)))
    found = open_prompts(path)
    assert sys.getsizeof(found._starts) < 20_000 * 8 * 1.3
    assert (len(found), found[-1][:6], found[12_345][:6]) == (20_000, "19999 ", "12345 ")
    assert [text[:2] for text in found[:3]] == ["0 ", "1 ", "2 "]
    with pytest.raises(IndexError):
        found[20_000]


def test_a_full_disk(tmp_path, full_disk):
    (tmp_path / "p.txt").write_text("many words\n" * 5000)
    with full_disk(1000), pytest.raises(WadiError, match="TMPDIR"):
        open_prompts(tmp_path / "p.txt")
