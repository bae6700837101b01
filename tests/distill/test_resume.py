"""An interrupted run is the uninterrupted one to the bit, and nothing saved is lost when something goes wrong."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tiny
from raising import raises_naming
from runs import WARM, assert_same_run, at_steps, state_of, terminate
from wadi import roles
from wadi.distill import checkpoint_folders, loop
from wadi.distill.loop import distill
from wadi.errors import Interrupted, WadiError

# --- resuming -----------------------------------------------------------------------------------------------------------------


LINEAR = r".*attn\d\.to_(q|k)"  # few layers, which every adapter can be on
OPTIONS = {"oft": {"oft_block_size": 4}, "road": {"group_size": 8}}


def adapters(student, fake, **of_student):
    """Settings of a run with these adapters."""
    student_settings, fake_settings = (
        {"adapter": name, "adapter_options": OPTIONS.get(name, {}), "target_modules": LINEAR} for name in (student, fake)
    )
    return {"student": {**student_settings, **of_student}, "fake": fake_settings}


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, (0, 2, 3)),
        ({"warm_start": WARM, "steps": 6, "batch": 3}, (0, 2, 4)),
        ({"objective": "dmd", "student": {"ema": 0.9}, "lr_schedule": "cosine", "lr_warmup": 2, "sample_every": 2}, (1, 2)),
        ({"dtype": "float16", "fake": {"updates": 2, "weighting": "none"}}, (1, 3)),
        ({"warm_start": WARM, "student": {"timesteps": [800, 400]}, "steps": 6, "accumulate": 2, "batch": 2}, (1, 3)),
        ({"objective": "dmd2", "objective_options": {"gan_weight": 0.1}, "warm_start": {"pairs": 4}}, (0, 2)),
        ({"objective": "sid", "gradient_checkpointing": True}, (1,)),
        ({"objective": "consistency", "warm_start": {"pairs": 4, "weight": 0.5}, "student": {"ema": 0.9}}, (1,)),
        ({**adapters("lora", "dora"), "gradient_checkpointing": True}, (1,)),
        ({**adapters("dora-frozen", "hra"), "dtype": "bfloat16", "optimizer": "adamw"}, (1,)),
        ({**adapters("full", "oft", ema=0.9), "steps": 3}, (1,)),
        ({**adapters("boft", "full"), "gradient_checkpointing": True, "steps": 3}, (1,)),
        ({**adapters("road", "dora-frozen", ema=0.5), "steps": 3}, (1,)),
        ({**adapters("hra", "lorad"), "steps": 3, "accumulate": 2}, (1,)),
    ],
    ids=[
        "plain",
        "warm start",
        "average",
        "half precision",
        "two steps",
        "gan",
        "sid",
        "consistency",
        "lora dora",
        "dora-frozen hra",
        "full oft",
        "boft full",
        "road dora-frozen",
        "hra lorad",
    ],
)
def test_an_interrupted_run_is_the_uninterrupted_one_to_the_bit(changes, stops, sd_folder, prompts_path, tmp_path, monkeypatch):
    straight, broken = (
        tiny.settings(sd_folder, prompts_path, tmp_path / name, **{"steps": 5, **changes}) for name in ("straight", "broken")
    )
    distill(straight)
    with monkeypatch.context() as patch:
        at_steps(patch, stops, terminate)
        for stop in stops:
            with pytest.raises(Interrupted) as stopped:
                distill(broken)
            assert stopped.value.signal == signal.SIGTERM
            assert state_of(tmp_path / "broken")[1]["step"] == stop + 1
        distill(broken)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


def test_signals_are_given_back_and_sigint_stops_too(sd_folder, prompts_path, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_steps(monkeypatch, [1], lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as stopped:
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    assert stopped.value.signal == signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stop_while_pairs_are_made_loses_nothing(sd_folder, prompts_path, tmp_path, monkeypatch):
    from wadi.distill import warm_start

    configs = [
        tiny.settings(sd_folder, prompts_path, tmp_path / name, warm_start=WARM, batch=3) for name in ("straight", "broken")
    ]
    distill(configs[0])
    monkeypatch.setattr(warm_start, "BATCH", 1)
    plain = warm_start.many_steps
    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "many_steps", lambda *a: terminate() or plain(*a))
        with pytest.raises(Interrupted):
            distill(configs[1])
    assert not (tmp_path / "broken" / "warm_start.safetensors").exists()
    distill(configs[1])
    pairs = [load_file(tmp_path / name / "warm_start.safetensors") for name in ("straight", "broken")]
    assert all(torch.equal(pairs[0][key], pairs[1][key]) for key in ("z", "rows"))
    assert_close(pairs[0]["x0"], pairs[1]["x0"], rtol=1e-3, atol=1e-3)  # made in other batches, so to rounding
    assert state_of(tmp_path / "broken")[1] == state_of(tmp_path / "straight")[1]


def test_pairs_are_saved_as_they_are_made(sd_folder, prompts_path, tmp_path, monkeypatch):
    from wadi.distill import warm_start
    from wadi.distill.run_folder import WARM_START_PARTS

    monkeypatch.setattr(warm_start, "BATCH", 2)
    plain, calls = warm_start.many_steps, []

    def stopping_in_the_third(*arguments):
        calls.append(len(arguments[3]))
        if len(calls) == 3:
            terminate()
        return plain(*arguments)

    monkeypatch.setattr(warm_start, "many_steps", stopping_in_the_third)
    warm = {**WARM, "pairs": 7}
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", warm_start=warm, batch=3)
    with pytest.raises(Interrupted):
        distill(config)
    assert len(list((tmp_path / "run" / WARM_START_PARTS).iterdir())) == 2
    distill(config)
    assert calls == [2, 2, 2, 2, 1]  # the third was not finished
    assert not (tmp_path / "run" / WARM_START_PARTS).exists()
    distill(dataclasses.replace(config, out=str(tmp_path / "straight")))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_damaged_part_of_the_pairs_is_named(sd_folder, prompts_path, tmp_path, monkeypatch):
    from wadi.distill import warm_start
    from wadi.distill.run_folder import WARM_START_PARTS

    monkeypatch.setattr(warm_start, "BATCH", 2)
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", warm_start={**WARM, "pairs": 4}, batch=3)
    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "_join", lambda *a: (_ for _ in ()).throw(WadiError("full")))
        with pytest.raises(WadiError, match="full"):
            distill(config)
    part = tmp_path / "run" / WARM_START_PARTS / "000001.safetensors"
    part.write_bytes(part.read_bytes()[:-9])
    with raises_naming(part):
        distill(config)
    part.unlink()
    distill(config)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[2]))
from wadi.distill import config_files, loop
from wadi.distill.run_folder import Run
plain = Run.log
def log(self, line):
    plain(self, line)
    if line["step"] == 4:
        with open(self.stats_file, "a") as stream:
            stream.write('{"step": 5, "loss_')  # and half a line
        os.kill(os.getpid(), signal.SIGKILL)
Run.log = log
loop.distill(config_files.load_config(Path(sys.argv[1])))
"""


def test_a_killed_run_is_the_uninterrupted_one_to_the_bit(sd_folder, prompts_path, tmp_path):
    from wadi.distill.config_files import save_config

    straight, broken = (
        tiny.settings(sd_folder, prompts_path, tmp_path / name, steps=5, checkpoint_every=2) for name in ("straight", "broken")
    )
    distill(straight)
    save_config(broken, tmp_path / "c.yaml")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c.yaml"), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-0000002"]
    distill(broken)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


# --- checkpoints that do not fit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_way(sd_folder, prompts_path, tmp_path_factory):
    """``(config, folder)`` of a run stopped at step 3 of 4, with checkpoints of steps 2 and 3; and the same run to its end."""
    place = tmp_path_factory.mktemp("half_way")
    changes = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 2}
    distill(tiny.settings(sd_folder, prompts_path, place / "whole", **changes))
    config = tiny.settings(sd_folder, prompts_path, place / "half", **changes)
    with pytest.MonkeyPatch.context() as patch:
        at_steps(patch, [2], terminate)
        with pytest.raises(Interrupted):
            distill(config)
    return config, place / "half", place / "whole"


@pytest.fixture
def copy(half_way, tmp_path):
    """A copy of it to spoil: ``(config, folder, whole run)``."""
    config, folder, whole = half_way
    shutil.copytree(folder, tmp_path / "copy")
    return dataclasses.replace(config, out=str(tmp_path / "copy")), tmp_path / "copy", whole


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    elif how == "missing":
        path.unlink()
    elif how == "emptied":
        path.write_text("{}")


def test_only_so_many_checkpoints_are_kept(half_way):
    assert sorted(path.name for path in (half_way[1] / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("training.safetensors", "truncated"), ("student/adapter_model.safetensors", "altered"), ("state.json", "missing"),
        ("manifest.json", "truncated"), ("manifest.json", "emptied"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_with_a_line(copy, file, how, capsys):
    config, folder, whole = copy
    (folder / "checkpoints" / "step-0000003-copy").mkdir()  # somebody's own
    spoil(folder / "checkpoints" / "step-0000003" / file, how)
    distill(config)
    (notice,) = [line for line in capsys.readouterr().err.splitlines() if "step-0000003" in line]
    assert file in notice
    assert_same_run(folder, whole)


def test_no_intact_checkpoint_is_an_error_and_changes_nothing(copy):
    config, folder, _ = copy
    for number in (2, 3):
        spoil(folder / "checkpoints" / f"step-000000{number}" / "training.safetensors", "altered")
    stats = (folder / "stats.jsonl").read_text()
    with raises_naming("step-0000003"):
        distill(config)
    assert (folder / "stats.jsonl").read_text() == stats


def test_a_checkpoint_of_another_teacher_is_refused(copy, sd_folder, tmp_path):
    config, folder, _ = copy
    other = tmp_path / "other"
    tiny.stable_diffusion(tmp_path / "parts", seed=1).save_pretrained(other)
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace(str(sd_folder), str(other)))
    _, before = state_of(folder)
    with raises_naming("step-0000003", before["teacher"]):
        distill(dataclasses.replace(config, teacher=str(other)))
    assert state_of(folder)[1] == before


def test_another_config_is_refused_and_the_difference_shown(copy):
    config, folder, _ = copy
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = dataclasses.replace(config, guidance_scale=2.0, student=dataclasses.replace(config.student, lr=0.5))
    with raises_naming("student.lr", 0.001, 0.5, "guidance_scale", 1.5, 2.0):
        distill(changed)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_may_be_moved_and_kept_book_of_differently(copy):
    config, folder, whole = copy
    distill(dataclasses.replace(config, checkpoint_every=3, keep_checkpoints=1))
    assert_same_run(folder, whole)


def test_a_full_disk_keeps_the_checkpoint_before(sd_folder, prompts_path, tmp_path, monkeypatch, full_disk):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=4, checkpoint_every=2)
    plain = loop.train_step

    def train_step(backbone, batch, timesteps, objective, config, state):
        if state.step == 2:
            disk.__enter__()
        return plain(backbone, batch, timesteps, objective, config, state)

    disk = full_disk(8_000)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        try:
            with raises_naming(tmp_path / "run"):
                distill(config)
        finally:
            disk.__exit__(None, None, None)
    last, complaints = checkpoint_folders.latest(tmp_path / "run" / "checkpoints")
    assert (last.name, complaints) == ("step-0000002", [])
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert left == []
    roles.read(tmp_path / "run" / "student")
    distill(config)  # with room again it goes on
    assert state_of(tmp_path / "run")[1]["step"] == 4
