"""Results: one hash of all that two numbers must share, and nothing compared without it."""

import dataclasses
import json
import os

import pytest

from raising import raises_naming
from wadi.cli.main import main
from wadi.evaluate.result import Number, Result, Row, canonical, protocol_hash, read_result
from wadi.evaluate.result_table import BEGIN, END, comparison_table, format_number, table, write_table

PROTOCOL = {"images": 8, "prompts": {"sha256": "ab", "count": 8}, "metrics": {"fd net": {"resize": "clean", "mean": (0.5, 1)}}}


def result(protocol=PROTOCOL, name="student", value=5.9):
    row = Row(name, {"steps": 1}, 8, {"fd net": Number(value, 0.11, 5.7, 6.1), "precision": Number(0.5)})
    return Result(protocol, [row], {"versions": {"torch": "2"}, "machine": "m"}, "wadi eval x")


def changed(**settings):
    return {**PROTOCOL, **settings}


def test_a_result_is_read_as_it_was_written(tmp_path):
    result().save(tmp_path / "a.json")
    found = read_result(tmp_path / "a.json")
    assert found.rows == result().rows
    assert found.hash == result().hash == json.loads((tmp_path / "a.json").read_text())["protocol_hash"]


def test_the_hash_is_of_content_not_of_order():
    assert canonical({"b": 1, "a": [1, 2.5, "é"]}) == '{"a":[1,2.5,"é"],"b":1}'.encode()
    assert result(dict(reversed(PROTOCOL.items()))).hash == result().hash
    for other in (changed(images=9), changed(prompts={"sha256": "ac", "count": 8}), changed(size=None)):
        assert result(other).hash != result().hash


def test_what_is_measured_does_not_enter_the_hash():
    row = dataclasses.replace(result().rows[0], generator={"steps": 25}, name="teacher")
    assert dataclasses.replace(result(), rows=[row], environment={}, command="other").hash == result().hash


def test_equal_hashes_are_compared(tmp_path, capsys):
    result().save(tmp_path / "a.json")
    result(name="teacher", value=5.4).save(tmp_path / "b.json")
    assert main(["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| student | 8 | 5.90 ± 0.11 |")
    assert lines[3].startswith("| teacher | 8 | 5.40 ± 0.11 |")


def test_settings_that_differ_are_named(tmp_path, capsys):
    result().save(tmp_path / "a.json")
    other = changed(prompts={"sha256": "ac", "count": 8}, metrics={"fd net": {"resize": "legacy-tf", "mean": (0.5, 1)}})
    result(other).save(tmp_path / "b.json")
    assert main(["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "prompts.sha256: 'ab' -> 'ac'" in error
    assert "resize: 'clean' -> 'legacy-tf'" in error
    assert "count" not in error  # what is the same is not named


def test_an_edited_result_is_named(tmp_path):
    path = tmp_path / "a.json"
    result().save(path)
    path.write_text(path.read_text().replace('"clean"', '"legacy-tf"'))
    with raises_naming(path):
        read_result(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "rows": [{}], "protocol": {}}'])
def test_a_file_that_is_not_a_result_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    result().save(tmp_path / "b.json")
    with raises_naming(path):
        comparison_table(path, tmp_path / "b.json")
    with raises_naming("gone.json"):
        comparison_table(tmp_path / "gone.json", tmp_path / "b.json")


def test_another_format_is_named(tmp_path):
    path = tmp_path / "a.json"
    result().save(path)
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with raises_naming(path, "format 9"):
        read_result(path)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number(5.8959, 0.1104), "5.90 ± 0.11"),
        (Number(0.97917, 0.00226), "0.9792 ± 0.0023"), (Number(123.4, 12.3), "123 ± 12"),
        (Number(0.3104), "0.3104"), (Number(1.0, 0.0), "1.000 ± 0.000"), (Number(-1e-5, 2e-4), "-0.00001 ± 0.00020"),
    ],
)  # fmt: skip
def test_digits_follow_the_spread(number, text):
    assert format_number(number) == text


def test_tables_show_every_metric_and_the_speed(tmp_path):
    speed = {"images_per_second": 3.25, "peak_memory_mib": None, "parameters": 12345, "repeats": 3}
    one = Row("a", {}, 8, {"fid": Number(1.0)}, speed)
    lines = table([one, Row("b", {}, 8, {"kid": Number(2.0), "fd net": Number(3.0)})]).splitlines()
    assert lines[0] == "|  | images | FID | KID | Frechet distance, net |"
    assert lines[2:4] == ["| a | 8 | 1 |  |  |", "| b | 8 |  | 2 | 3 |"]
    assert lines[5].startswith("|  | images per second | latency p50, ms |")
    assert lines[7:] == ["| a | 3.2 |  |  |  | 12,345 |  |"]
    dataclasses.replace(result(), rows=[one]).save(tmp_path / "a.json")
    assert "images per second" not in comparison_table(tmp_path / "a.json", tmp_path / "a.json")


def test_a_table_goes_between_its_markers(tmp_path):
    path = tmp_path / "results.md"
    write_table(path, result())
    assert "Every row: `wadi eval x`" in path.read_text()
    page = f"# Title\n\n{BEGIN}\nold\n{END}\n\nprose\n"
    path.write_text(page)
    write_table(path, result())
    text = path.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nprose\n")
    assert "old" not in text
    assert result().hash in text
    path.write_text("prose without markers")
    with raises_naming(path, "<!-- wadi eval: begin -->"):
        write_table(path, result())
    assert path.read_text() == "prose without markers"


def _changed(path, change):
    """A result file with a change, and a hash that fits its settings."""
    content = json.loads(path.read_text())
    change(content)
    if isinstance(content["protocol"], dict):
        content["protocol_hash"] = protocol_hash(content["protocol"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: c["rows"][0].update(images=-1), "images"),
        (lambda c: c["rows"][0].update(images="8"), "images"),
        (lambda c: c["rows"][0].update(metrics=[]), "metrics"),
        (lambda c: c["rows"][0]["metrics"].update(fd=3), "metrics"),
        (lambda c: next(iter(c["rows"][0]["metrics"].values())).update(value="x"), "value"),
        (lambda c: next(iter(c["rows"][0]["metrics"].values())).update(std=float("nan")), "std"),
        (lambda c: c.update(protocol=[1]), "protocol"),
        (lambda c: c.update(rows={}), "rows"),
        (lambda c: c.update(format=[1]), "format"),
        (lambda c: c.update(command=3), "command"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(tmp_path, change, key):
    path = tmp_path / "a.json"
    result().save(path)
    _changed(path, change)
    with raises_naming(path, key):
        read_result(path)


@pytest.mark.parametrize("data", [b'{"format": "\xe9"}', b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe{\x00"])
def test_hostile_files_are_named(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with raises_naming(path):
        read_result(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read(tmp_path, make):
    path = tmp_path / "a.json"
    make(path)
    with raises_naming(path):
        read_result(path)
    with raises_naming(path):
        write_table(path, result())
