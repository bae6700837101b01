"""Files and folders are written whole or not at all."""

import os
from pathlib import Path

import pytest

from wadi.errors import WadiError
from wadi.files import sha256, whole_folder, write_whole


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert everything_in(tmp_path) == {"deep": None, "deep/file": b"new"}


def test_a_folder_is_replaced_with_all_it_held(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "deep" / "run") as folder:
            (folder / content).write_text(content)
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text(content)
    assert everything_in(tmp_path) == {
        "deep": None, "deep/run": None, "deep/run/new": b"new", "deep/run/sub": None, "deep/run/sub/x": b"new",
    }  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failing_block_leaves_the_old_folder(tmp_path, error):
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("old")
    before = everything_in(tmp_path)

    def fail():
        with whole_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("new")
            raise error

    with pytest.raises(WadiError if error is OSError else error):
        fail()
    assert everything_in(tmp_path) == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("old")
    before, replace = everything_in(tmp_path), os.replace

    def second_fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(WadiError, match="Input/output error"), whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("new")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_whole(tmp_path / "file", b"old")

    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((WadiError, KeyboardInterrupt)):
        write_whole(tmp_path / "file", b"new")
    assert everything_in(tmp_path) == {"file": b"old"}


def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path):
    (tmp_path / ".run.99999.tmp").mkdir()
    (tmp_path / ".run-2.99999.tmp").mkdir()
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("x")
    assert everything_in(tmp_path) == {"run": None, "run/a": b"x", ".run-2.99999.tmp": None}


def test_a_file_where_a_folder_should_be(tmp_path):
    """Root may write anywhere, so that a place which takes no files is made of a file."""
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(WadiError, match="Cannot write"):
        write_whole(tmp_path / "taken" / "file", b"x")
    with pytest.raises(WadiError, match="Cannot write"), whole_folder(tmp_path / "taken" / "run"):
        pass
    with pytest.raises(WadiError, match="Cannot write"), whole_folder(tmp_path / "taken"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(WadiError, match="Cannot write"):
        write_whole(tmp_path / "folder", b"x")
    assert everything_in(tmp_path) == {"taken": b"mine", "folder": None}


def test_a_full_disk(tmp_path, full_disk):
    import torch
    from safetensors.torch import save_file

    def file():
        write_whole(tmp_path / "file", bytes(200_000))

    def folder():
        with whole_folder(tmp_path / "run") as temporary:
            (temporary / "a").write_bytes(bytes(200_000))

    def folder_of_tensors():
        with whole_folder(tmp_path / "run") as temporary:
            save_file({"a": torch.zeros(50_000)}, temporary / "a")

    write_whole(tmp_path / "file", b"old")
    with whole_folder(tmp_path / "run") as old:
        (old / "a").write_text("old")
    before = everything_in(tmp_path)
    for attempt in (file, folder, folder_of_tensors):
        with full_disk(100_000), pytest.raises(WadiError, match=r"Cannot write .*File too large"):
            attempt()
    assert everything_in(tmp_path) == before


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
