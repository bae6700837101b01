"""The same teacher is recognised by all of its files, wherever it lies; a changed one is not continued."""

import hashlib
import json
import os
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

import tiny
from runs import at_steps, terminate
from wadi.backbones import load_pipeline
from wadi.backbones.digest import loaded_digest, teacher_digest
from wadi.distill import checkpoint_folders, loop
from wadi.errors import Interrupted, WadiError
from wadi.io import digest_cache


@pytest.fixture
def teacher(folder_of, tmp_path):
    return shutil.copytree(folder_of("sdxl"), tmp_path / "teacher")


def change_last_value(file):
    """Of the largest tensor, beyond its first 64 values."""
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_copies_have_one_digest_and_so_has_the_loaded_pipeline(teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "elsewhere")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({"_name_or_path": "x", "_diffusers_version": "0", **config}))
    os.rename(other / "vae", tmp_path / "vae")
    os.symlink(tmp_path / "vae", other / "vae")
    assert teacher_digest(other) == teacher_digest(teacher) == loaded_digest(load_pipeline(teacher))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_one_value_anywhere_changes_the_digest(teacher, component):
    before = teacher_digest(teacher)
    change_last_value(next((teacher / component).glob("*.safetensors")))
    assert teacher_digest(teacher) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("scheduler/scheduler_config.json", '"beta_end": 0.012', '"beta_end": 0.013'),
        ("vae/config.json", '"act_fn": "silu"', '"act_fn": "relu"'),
        ("tokenizer_2/tokenizer.json", '"a": ', '"a":  '),
    ],
)
def test_a_setting_changes_the_digest(teacher, file, old, new):
    before, text = teacher_digest(teacher), (teacher / file).read_text()
    assert old in text
    (teacher / file).write_text(text.replace(old, new, 1))
    assert teacher_digest(teacher) != before


def test_files_that_no_model_reads_do_not_change_the_digest(teacher):
    """What file managers, editors and other libraries leave in the folders."""
    before = teacher_digest(teacher)
    for place in ("unet", "text_encoder", "tokenizer", "scheduler"):
        (teacher / place / ".DS_Store").write_bytes(b"x")
    (teacher / "text_encoder" / "model.onnx").write_bytes(b"x")
    (teacher / "unet" / "README.md").write_text("x")
    assert teacher_digest(teacher) == before


# --- the cache --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "large.bin"
    file.write_bytes(b"a" * (digest_cache.SMALLEST_CACHED + 1))
    monkeypatch.setattr(digest_cache, "SETTLE_SECONDS", -1e9)  # as if it had been written long ago
    return file


def count_reads(monkeypatch):
    read, plain = [], digest_cache.sha256
    monkeypatch.setattr(digest_cache, "sha256", lambda file: read.append(file) or plain(file))
    return read


def test_a_file_is_read_once_until_it_changes(large, monkeypatch):
    read = count_reads(monkeypatch)
    expected = hashlib.sha256(large.read_bytes()).hexdigest()
    assert digest_cache.cached_sha256([large, large]) == [expected, expected]
    digest_cache._in_memory.clear()  # as in another process
    assert digest_cache.cached_sha256([large]) == [expected]
    assert len(read) == 1
    times = large.stat()
    large.write_bytes(b"b" + large.read_bytes()[1:])
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time of change, same inode
    assert digest_cache.cached_sha256([large]) == [hashlib.sha256(large.read_bytes()).hexdigest()]
    assert len(read) == 2


def test_a_file_that_was_just_written_is_not_kept(large, monkeypatch):
    monkeypatch.setattr(digest_cache, "SETTLE_SECONDS", 3600)
    read = count_reads(monkeypatch)
    digest_cache.cached_sha256([large])
    digest_cache.cached_sha256([large])
    assert len(read) == 2


def test_a_process_reads_a_file_once_also_without_a_cache(large, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    read = count_reads(monkeypatch)
    assert digest_cache.cached_sha256([large]) == digest_cache.cached_sha256([large])
    assert len(read) == 1


@pytest.mark.parametrize("how", ["damaged", "a file", "no home"])
def test_a_cache_that_cannot_be_used_costs_only_time(large, monkeypatch, tmp_path, how):
    expected = digest_cache.cached_sha256([large])
    digest_cache._in_memory.clear()  # as in another process
    if how == "damaged":
        for kept in (tmp_path / "cache" / "digests").iterdir():
            kept.write_text('{"state": "x"}')
    elif how == "a file":
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.delenv("WADI_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert digest_cache.cached_sha256([large]) == expected


def test_reading_again_takes_no_time(large, monkeypatch):
    large.write_bytes(os.urandom(64 * 2**20))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        digest_cache.cached_sha256([large])
        times.append(time.perf_counter() - start)
        digest_cache._in_memory.clear()  # as in another process
    assert times[1] < times[0] / 4


# --- runs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(sd_folder, prompts_path, tmp_path, monkeypatch):
    """``(settings, teacher folder)`` of a run that was stopped after a step."""
    folder = shutil.copytree(sd_folder, tmp_path / "teacher")
    config = tiny.settings(folder, prompts_path, tmp_path / "run", steps=3)
    at_steps(monkeypatch, {1}, terminate)
    with pytest.raises(Interrupted):
        loop.distill(config)
    return config, folder


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_run_is_not_continued_with_a_teacher_that_changed_in_any_part(interrupted, component):
    config, folder = interrupted
    change_last_value(next((folder / component).glob("*.safetensors")))
    with pytest.raises(WadiError, match=teacher_digest(folder)[:16]):
        loop.distill(config)


def test_a_run_of_an_earlier_version_is_continued_and_has_the_digest_from_then_on(interrupted):
    config, folder = interrupted
    last, _ = checkpoint_folders.latest(tmp := (folder.parent / "run" / "checkpoints"))
    state = json.loads((last / "state.json").read_text())
    assert state.pop("pipeline") == teacher_digest(folder)
    (last / "state.json").write_text(json.dumps(state))
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["state.json"] = digest_cache.sha256(last / "state.json")
    (last / "manifest.json").write_text(json.dumps(manifest))
    loop.distill(config)
    last, _ = checkpoint_folders.latest(tmp)
    state = json.loads((last / "state.json").read_text())
    assert state["step"] == 3
    assert state["pipeline"] == teacher_digest(folder)
