"""One reader for JSON and one for YAML: a wrong file is one error that names the file and the field."""

import ast
import os
import socket
from pathlib import Path

import pytest

import wadi
from wadi.distill import checkpoints, config_files
from wadi.distill.run_folder import read_stats
from wadi.errors import WadiError
from wadi.io.records import Count, Finite, Record, Side, parse_json, read_json, read_json_lines
from wadi.io.yaml_files import parse_yaml, read_yaml
from wadi.roles import read_about

ROOT = Path(wadi.__file__).parent
READER = ROOT / "io" / "records.py"
ALONE = ROOT / "runtime" / "run.py"  # copied into exports, where this package is missing


class Inner(Record):
    images: Count


class Example(Record):
    step: Count
    rate: Finite = 0.0
    resolution: tuple[Side, Side] | None = None
    rows: tuple[Inner, ...] = ()


@pytest.fixture
def wrong(tmp_path):
    """The message for ``content`` in a file; it names the file."""

    def run(content, read=lambda path: read_json(path, Example)):
        path = tmp_path / "it.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(WadiError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert len(str(error.value)) < 1000
        return str(error.value)

    return run


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "it.json"
    path.write_bytes(b'\xef\xbb\xbf{"step": 3, "rate": 1, "later": [1], "rows": [{"images": 4}], "resolution": [16, 32]}')
    assert read_json(path, Example) == Example(3, 1.0, (16, 32), (Inner(4),))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"step": "three"}', ("'step'", "'three'")),
        ('{"step": true}', ("'step'", "True")),
        ('{"step": 1.5}', ("'step'", "1.5")),
        ('{"step": -1}', ("'step'", "-1")),
        ('{"step": 100000000000000000000}', ("'step'", "100000000000000000000")),
        ('{"step": 1, "rate": NaN}', ("'rate'", "nan")),
        ('{"step": 1, "rate": 1e999}', ("'rate'", "inf")),
        ('{"step": 1, "resolution": [16]}', ("'resolution'", "[16]")),
        ('{"step": 1, "resolution": [16, 0]}', ("'resolution[1]'", "0")),
        ('{"step": 1, "rows": [{"images": 1}, {"images": -1}]}', ("'rows[1].images'", "-1")),
        ('{"step": 1, "rows": {}}', ("'rows'", "array")),
        ("{}", ("step",)),
        ("[]", ("object", "array")),
        ("null", ("null",)),
        ("", ("line 1",)),
        ('{"step": 1', ("line 1",)),
        ('{"step": 1}\x00', ("line 1",)),
        ("[" * 100_000, ("nested",)),
        ('{"step": 1, "later": ' + "[" * 200 + "]" * 200 + "}", ("nested",)),
        ('{"step": ' + "9" * 5000 + "}", ("digits",)),
        ('{"step": 1, "name": "\\ud800"}', (r"\ud800",)),
        ('{"step": 1, "name": "caf\xe9"}'.encode("latin-1"), ("UTF-8", "0xe9", "line 1")),
        ('{"step": 1}'.encode("utf-16"), ("UTF-16",)),
    ],
)
def test_what_is_wrong_is_named(content, words, wrong):
    message = wrong(content)
    assert all(word in message for word in words), message


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path):
    fifo, plug, large = tmp_path / "fifo", tmp_path / "socket", tmp_path / "large.json"
    os.mkfifo(fifo)
    os.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind("socket")
        large.write_bytes(b"[" + b" " * 100 + b"]")
        for path, word in (
            (tmp_path, "folder"), (fifo, "pipe"), (plug, "socket"), (Path("/dev/zero"), "device"), (tmp_path / "no", "exist"),
            (tmp_path / ("x" * 5000), "long"), (tmp_path / "a\0b", "null"),
        ):  # fmt: skip
            for read in (lambda path: read_json(path, list), read_yaml, lambda path: read_json_lines(path, list)):
                with pytest.raises(WadiError, match=word):
                    read(path)
    with pytest.raises(WadiError, match="100"):
        read_json(large, list, limit=100)
    assert read_json(large, list, limit=102) == []


def test_half_a_last_line_is_left_out_and_no_other(tmp_path, wrong):
    path = tmp_path / "stats.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n\n{"step": 2}\n{"step": 3, "lo')
    assert read_stats(path) == [{"step": 1, "loss": 0.5}, {"step": 2}]
    assert read_stats(tmp_path / "none") == []
    for content, words in (
        ('{"step": 1}\n{"ste\n{"step": 3}\n', ("line 2",)),
        ('{"step": 1}\n{"step": 2, "loss": "high"}\n', ("line 2", "'high'")),
        ('{"step": 1}\n[2]\n', ("line 2",)),
        ('{"step": 1}\n{"loss": 2}\n', ("entry 2", "step")),
        ('{"step": 1}\n' + "[" * 100_000, ("line 2", "nested")),
        (b'{"step": 1, "x\xe9": 1}\n{"step": 2}\n', ("line 1", "0xe9")),
    ):
        message = wrong(content, read_stats)
        assert all(word in message for word in words), message


# --- YAML -------------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, ("aliases", "values")),
        (MERGES, ("aliases", "values")),
        ("a: &a [1, *a]", ("contains itself", "line 1")),
        ("a: &a {b: *a}", ("contains itself",)),
        ("[" * 100_000, ("nested",)),
        ("- " * 1000 + "1", ("nested",)),
        ("steps: " + "9" * 5000, ("digits",)),
        ("steps: [1", ("line 2",)),
        ("steps: !!python/object/apply:os.system ['true']", ("python",)),
        ("? [1]\n: 2", ("line 1",)),
        ("when: 2001-99-99", ("month",)),
        ("*nothing", ("nothing",)),
        (b"a: caf\xe9", ("UTF-8", "0xe9", "line 1")),
        ("a: 1".encode("utf-16"), ("UTF-16",)),
        ("a: 1\0", ("YAML",)),
        ("a: " + "x" * 2**20, ("bytes",)),
    ],
)
def test_what_is_wrong_in_yaml_is_named(content, words, wrong):
    message = wrong(content, read_yaml)
    assert all(word in message for word in words), message


def test_plain_aliases_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "it") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert parse_yaml("", "it") is None
    assert parse_json('"\\ud83d\\ude00"', str, "it") == "\U0001f600"  # a whole pair is a character


# --- the files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"timestep": "800"}', ("'timestep'", "'800'")),
        ('{"timestep": 800, "resolution": [16]}', ("'resolution'", "[16]")),
        ('{"timestep": 800, "teacher": 5}', ("'teacher'", "5")),
        ('{"timestep": -1}', ("'timestep'", "-1")),
    ],
)
def test_the_record_of_a_student(content, words, tmp_path):
    (tmp_path / "wadi.json").write_text(content)
    with pytest.raises(WadiError) as error:
        read_about(tmp_path)
    assert all(word in str(error.value) for word in (*words, "wadi.json"))


@pytest.mark.parametrize("field", ["step", "drawn", "skipped", "skipped_in_a_row", "seconds", "scalers", "teacher", "images"])
def test_the_state_of_a_checkpoint_is_typed(field, tmp_path):
    state = {
        "step": 1, "drawn": 4, "skipped": 0, "skipped_in_a_row": {"student": 0}, "seconds": 1.5,
        "scalers": {"student": {"scale": 65536.0, "_growth_tracker": 3}, "fake": {}}, "teacher": "ab", "prompts": "cd",
        "images": 4,
    }  # fmt: skip
    path = tmp_path / "state.json"
    import json

    path.write_text(json.dumps({name: value for name, value in state.items() if name not in ("prompts", "images")}))
    earlier = read_json(path, checkpoints.Saved)
    assert (earlier.prompts, earlier.images, earlier.scalers["student"]) == (
        None,
        None,
        {"scale": 65536.0, "_growth_tracker": 3},
    )
    path.write_text(json.dumps({**state, field: [-1]}))
    with pytest.raises(WadiError, match=rf"'{field}'"):
        read_json(path, checkpoints.Saved)


def test_a_config_of_any_kind_of_wrong_is_an_error_with_its_file(tmp_path):
    path = tmp_path / "config.yaml"
    for content in (LAUGHS, "steps: many", "stdent: {}", "- 1", "student: 5", b"a: \xe9"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(WadiError) as error:
            config_files.load_config(path)
        assert str(path) in str(error.value)


# --- nothing else parses ----------------------------------------------------------------------------------------------------

PARSERS = {("json", "loads"), ("json", "load"), ("yaml", "safe_load"), ("yaml", "load"), ("json", "JSONDecoder")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_json_and_yaml_are_parsed_by_the_reader_alone(path):
    if path in (READER, ALONE):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in PARSERS
    ]
    used += [
        f"line {node.lineno}: from {node.module} import {alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module, alias.name) in PARSERS
    ]
    assert used == []
