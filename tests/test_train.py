"""The loop: what changes and what does not, resuming to the bit, and what is saved when something goes wrong."""

import dataclasses
import json
import math
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
from wadi import adapters, checkpoint, train
from wadi.backbones import load_pipeline
from wadi.config import load as load_config
from wadi.errors import WadiError
from wadi.train import Interrupted, distill

TIMES = {"seconds", "images_per_second", "peak_memory_mib", "student_ms_per_image", "teacher_ms_per_image"}
WARM = {"pairs": 3, "sampler_steps": 2, "steps": 2, "fake_steps": 1, "weight": 0.5}


def stats_of(run):
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def state_of(run):
    """Everything the last checkpoint and the saved adapters hold, times apart."""
    last, _ = checkpoint.latest(run / "checkpoints")
    tensors = {}
    for place in (last, run):
        for file in (*place.glob("*.safetensors"), *place.glob("*/*.safetensors")):
            where = f"{place.relative_to(run).parent}/{file.relative_to(place)}"
            tensors |= {f"{where}: {name}": value for name, value in load_file(file).items()}
    plain = json.loads((last / "state.json").read_text())
    return tensors, {name: value for name, value in plain.items() if name != "seconds"}


def assert_same_run(one, other):
    (tensors, plain), (others, other_plain) = state_of(one), state_of(other)
    assert plain == other_plain
    assert tensors.keys() == others.keys()
    different = [name for name, value in tensors.items() if not torch.equal(value, others[name])]
    assert different == []
    assert stats_of(one) == stats_of(other)


def at_steps(monkeypatch, steps, act):
    """Call ``act()`` at the start of each of ``steps`` (counted from 0), once each."""
    plain, left = train.train_step, set(steps)

    def train_step(backbone, batch, timestep, config, state):
        if state.step in left:
            left.remove(state.step)
            act()
        return plain(backbone, batch, timestep, config, state)

    monkeypatch.setattr(train, "train_step", train_step)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# --- what changes -------------------------------------------------------------------------------------------------------------


def test_angles_change_and_every_other_tensor_stays(sd_folder, prompts_path, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(train, "load_pipeline", lambda *a: kept.append(load_pipeline(*a)) or kept[0])
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    fresh = load_pipeline(sd_folder)
    for part in ("unet", "vae", "text_encoder"):
        own = {k: v for k, v in getattr(kept[0], part).state_dict().items() if "lorad_" not in k}
        expected = getattr(fresh, part).state_dict()
        assert {key.replace(".base_layer", "") for key in own} == expected.keys()
        assert all(torch.equal(value, expected[key.replace(".base_layer", "")]) for key, value in own.items())
    for role in ("student", "fake"):
        angles = list(adapters.angles(kept[0].unet, role))
        moved = [name for name, theta in angles if theta.abs().max() > 0]
        assert len(moved) > 0.9 * len(angles)  # every layer that the loss reaches


def passes(config, monkeypatch):
    """Rows of each pass through the network during training, and how often each role's optimiser steps."""
    rows, plain = [], train.train_step

    def train_step(backbone, *arguments):
        hook = backbone.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        try:
            return plain(backbone, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "train_step", train_step)
    folder = distill(config)
    return rows, load_file(next((folder / "checkpoints").glob("step-*")) / "training.safetensors")


def test_conditional_and_null_rows_go_through_as_one_batch(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Per step: the student, teacher and fake model with guidance, and the fake model's own loss. Nothing else."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, fake={"updates": 2})
    rows, moments = passes(config, monkeypatch)
    assert rows == [2, 4, 4, 2, 2]
    assert moments["student.0.step"] == 1
    assert moments["fake.0.step"] == 2


def test_guidance_1_takes_no_null_rows(sd_folder, prompts_path, tmp_path, monkeypatch):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, guidance_scale=1.0, fake={"guidance_scale": 1.0})
    assert passes(config, monkeypatch)[0] == [2, 2, 2, 2]


def test_at_the_first_step_teacher_and_fake_model_agree(finished_run):
    first = stats_of(finished_run)[0]
    assert first["loss_student"] == 0
    assert all(value == 0 for name, value in first.items() if name.startswith("teacher_fake_distance"))
    assert stats_of(finished_run)[-1]["loss_student"] > 0


def test_the_student_is_asked_at_its_own_timestep(sd_folder, prompts_path, tmp_path, monkeypatch):
    """What is trained is what is drawn later: at the start, the network's answer at ``t*`` to the step's noise and prompts."""
    seen, plain = [], train.train_step

    @torch.no_grad()
    def train_step(backbone, batch, timestep, config, state):
        with adapters.active(backbone.network, None):
            prediction = backbone.predict(batch.z, torch.tensor([800] * 2), batch.condition)
        seen.append(backbone.process.x0(prediction, batch.z, torch.tensor([800] * 2)))
        with torch.enable_grad():
            return plain(backbone, batch, timestep, config, state)

    gradient = train.vsd_gradient
    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "vsd_gradient", lambda x0, *rest: seen.append(x0.detach()) or gradient(x0, *rest))
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, student={"timestep": 800}))
    assert_close(seen[1], seen[0])


def test_gradient_checkpointing_and_recomputing_change_memory_only(sd_folder, prompts_path, tmp_path):
    runs = [
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / name, **changes))
        for name, changes in (
            ("plain", {}),
            ("checkpointing", {"gradient_checkpointing": True}),
            ("recompute", {"recompute": True}),
        )
    ]
    plain, *others = (state_of(run)[0] for run in runs)
    for other in others:
        for name, value in plain.items():
            assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_what_a_run_leaves_behind(finished_run, sd_folder):
    names = {path.relative_to(finished_run).as_posix() for path in finished_run.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "stats.jsonl", "samples/step-0000000.png", "samples/step-0000003.png",
        *(f"{place}{role}/{file}" for place in ("", "checkpoints/step-0000003/") for role in ("student", "fake")
          for file in ("adapter_config.json", "adapter_model.safetensors")),
        "student/wadi.json", "fake/wadi.json",
        *(f"checkpoints/step-0000003/{file}" for file in ("training.safetensors", "state.json", "manifest.json")),
    }  # fmt: skip
    about = json.loads((finished_run / "student" / "wadi.json").read_text())
    assert (about["timestep"], about["teacher"], about["step"]) == (800, str(sd_folder), 3)
    assert [line["step"] for line in stats_of(finished_run)] == [1, 2, 3]
    assert load_config(finished_run / "config.yaml").student.timestep == 800
    last = stats_of(finished_run)[-1]
    assert {"diversity_ratio", "contrast_ratio", "student_angle_rms", "fake_grad_norm", "skipped"} <= last.keys()


def test_the_moving_average_is_what_is_saved(sd_folder, prompts_path, tmp_path):
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", student={"ema": 0.9}))
    last, _ = checkpoint.latest(run / "checkpoints")
    average = {k.removeprefix("ema."): v for k, v in load_file(last / "training.safetensors").items() if k.startswith("ema.")}
    saved = load_file(run / "student" / adapters.WEIGHTS)
    live = load_file(last / "student" / adapters.WEIGHTS)
    assert average.keys() == saved.keys() == live.keys()
    assert all(torch.equal(saved[key], average[key]) for key in saved)
    assert any(not torch.equal(saved[key], live[key]) for key in saved)


def test_a_finished_run_is_left_as_it_is(finished_run, monkeypatch):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "train_step", lambda *a: pytest.fail("nothing is left to do"))
    distill(load_config(finished_run / "config.yaml"))
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before


# --- resuming -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, (0, 2, 3)),
        ({"warm_start": WARM, "steps": 6, "batch": 3}, (0, 2, 4)),
        ({"student": {"ema": 0.9, "weighting": "dmd"}, "lr_schedule": "cosine", "lr_warmup": 2, "sample_every": 2}, (1, 2)),
        ({"dtype": "float16", "fake": {"updates": 2, "weighting": "none"}}, (1, 3)),
    ],
    ids=["plain", "warm start", "average", "half precision"],
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
            assert f"step {stop + 1} of" in str(stopped.value)
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
    from wadi import warm_start

    configs = [
        tiny.settings(sd_folder, prompts_path, tmp_path / name, warm_start=WARM, batch=3) for name in ("straight", "broken")
    ]
    distill(configs[0])
    monkeypatch.setattr(warm_start, "BATCH", 1)
    plain = warm_start.many_steps
    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "many_steps", lambda *a: terminate() or plain(*a))
        with pytest.raises(Interrupted, match="step 0 of"):
            distill(configs[1])
    distill(configs[1])
    pairs = [load_file(tmp_path / name / "warm_start.safetensors") for name in ("straight", "broken")]
    assert all(torch.equal(pairs[0][key], pairs[1][key]) for key in ("z", "rows"))
    assert_close(pairs[0]["x0"], pairs[1]["x0"], rtol=1e-3, atol=1e-3)  # made in other batches, so to rounding
    assert state_of(tmp_path / "broken")[1] == state_of(tmp_path / "straight")[1]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[2]))
from wadi import config, train
plain = train.Run.log
def log(self, line):
    plain(self, line)
    if line["step"] == 4:
        with open(self.stats_file, "a") as stream:
            stream.write('{"step": 5, "loss_')  # and half a line
        os.kill(os.getpid(), signal.SIGKILL)
train.Run.log = log
train.distill(config.load(Path(sys.argv[1])))
"""


def test_a_killed_run_is_the_uninterrupted_one_to_the_bit(sd_folder, prompts_path, tmp_path):
    from wadi import config as configs

    straight, broken = (
        tiny.settings(sd_folder, prompts_path, tmp_path / name, steps=5, checkpoint_every=2) for name in ("straight", "broken")
    )
    distill(straight)
    configs.save(broken, tmp_path / "c.yaml")
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
    told = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(told) == 1
    assert "step-0000003" in told[0]
    assert file in told[0]
    assert_same_run(folder, whole)


def test_no_intact_checkpoint_is_an_error_and_changes_nothing(copy):
    config, folder, _ = copy
    for number in (2, 3):
        spoil(folder / "checkpoints" / f"step-000000{number}" / "training.safetensors", "altered")
    stats = (folder / "stats.jsonl").read_text()
    with pytest.raises(WadiError, match=r"No checkpoint .* is intact"):
        distill(config)
    assert (folder / "stats.jsonl").read_text() == stats


def test_a_checkpoint_of_another_teacher_is_refused(copy, sd_folder, tmp_path):
    config, folder, _ = copy
    other = tmp_path / "other"
    tiny.stable_diffusion(tmp_path / "parts", seed=1).save_pretrained(other)
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace(str(sd_folder), str(other)))
    with pytest.raises(WadiError, match="fingerprint"):
        distill(dataclasses.replace(config, teacher=str(other)))


def test_another_config_is_refused_and_the_difference_shown(copy):
    config, folder, _ = copy
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = dataclasses.replace(config, guidance_scale=2.0, student=dataclasses.replace(config.student, lr=0.5))
    with pytest.raises(WadiError, match=r"student\.lr: 0\.001 -> 0\.5; guidance_scale: 1\.5 -> 2\.0"):
        distill(changed)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_may_be_moved_and_kept_book_of_differently(copy):
    config, folder, whole = copy
    distill(dataclasses.replace(config, checkpoint_every=3, keep_checkpoints=1))
    assert_same_run(folder, whole)


# --- what is not finite -------------------------------------------------------------------------------------------------------


def nan_gradient(monkeypatch, steps):
    """The student's gradient is not a number at ``steps``; the fake model never notices."""
    plain, calls = train.vsd_gradient, []

    def vsd_gradient(*arguments):
        calls.append(None)
        return plain(*arguments) * (float("nan") if len(calls) - 1 in steps else 1)

    monkeypatch.setattr(train, "vsd_gradient", vsd_gradient)


def test_a_step_that_is_not_finite_is_left_out_and_counted(sd_folder, prompts_path, tmp_path, monkeypatch):
    nan_gradient(monkeypatch, {1})
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=3, checkpoint_every=1, keep_checkpoints=3))
    assert [line["skipped"] for line in stats_of(run)] == [0, 1, 1]
    assert "loss_student" not in stats_of(run)[1]  # no number is made of it
    saved = [
        {role: load_file(run / "checkpoints" / f"step-000000{n}" / role / adapters.WEIGHTS) for role in ("student", "fake")}
        for n in (1, 2, 3)
    ]
    assert all(torch.equal(value, saved[1]["student"][key]) for key, value in saved[0]["student"].items())
    assert any(not torch.equal(value, saved[1]["fake"][key]) for key, value in saved[0]["fake"].items())
    assert any(not torch.equal(value, saved[2]["student"][key]) for key, value in saved[1]["student"].items())
    assert all(value.isfinite().all() for value in saved[2]["student"].values())


def test_one_role_that_stays_not_finite_stops_the_run(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Though the other role's steps succeed in between."""
    nan_gradient(monkeypatch, set(range(1, 99)))
    config = tiny.settings(
        sd_folder, prompts_path, tmp_path / "run", steps=20, checkpoint_every=1, max_skipped=3, keep_checkpoints=1
    )
    with pytest.raises(WadiError, match=r"student's gradient was not finite 3 times in a row at step 3"):
        distill(config)
    last, complaints = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert (last.name, complaints) == ("step-0000003", [])
    # the count is part of the state: the same command does not buy three more
    nan_gradient(monkeypatch, set(range(99)))
    with pytest.raises(WadiError, match=r"3 times in a row at step 3"):
        distill(config)


def test_angles_that_left_the_numbers_stop_the_run(sd_folder, prompts_path, tmp_path):
    with pytest.raises(WadiError, match="gradient was not finite"):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=20, max_skipped=2, fake={"lr": 1e25}))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == (None, [])


# --- places and parts ---------------------------------------------------------------------------------------------------------


def test_a_mistyped_run_leaves_no_folder_that_refuses_the_right_one(sd_folder, prompts_path, tmp_path):
    wrong = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    for change in (
        {"teacher": str(tmp_path / "nowhere")}, {"prompts": str(tmp_path / "nowhere")}, {"device": "cuda:99"},
        {"tracker": "nonsense"}, {"student": dataclasses.replace(wrong.student, timestep=1000)},
        {"student": dataclasses.replace(wrong.student, target_modules="nothing")}, {"resolution": (17, 16)},
    ):  # fmt: skip
        with pytest.raises(WadiError):
            distill(dataclasses.replace(wrong, **change))
        assert not (tmp_path / "run").exists(), change
    distill(wrong)


def test_a_folder_of_something_else_is_not_touched(sd_folder, prompts_path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(WadiError, match="is no run"):
            distill(tiny.settings(sd_folder, prompts_path, tmp_path / name))
    with pytest.raises(WadiError, match="Cannot write"):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "file" / "run"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_tensorboard_gets_the_figures(sd_folder, prompts_path, tmp_path):
    pytest.importorskip("tensorboard")
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, tracker="tensorboard"))
    assert list(run.rglob("events.out.tfevents.*"))


def test_a_full_disk_keeps_the_checkpoint_before(sd_folder, prompts_path, tmp_path, monkeypatch, full_disk):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=4, checkpoint_every=2)
    plain = train.train_step

    def train_step(backbone, batch, timestep, config, state):
        if state.step == 2:
            disk.__enter__()
        return plain(backbone, batch, timestep, config, state)

    disk = full_disk(8_000)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        try:
            with pytest.raises(WadiError, match=r"Cannot write .*File too large"):
                distill(config)
        finally:
            disk.__exit__(None, None, None)
    last, complaints = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert (last.name, complaints) == ("step-0000002", [])
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert left == []
    adapters.read(tmp_path / "run" / "student")
    distill(config)  # with room again it goes on
    assert state_of(tmp_path / "run")[1]["step"] == 4


def test_learning_rates(sd_folder, prompts_path):
    from types import SimpleNamespace

    from wadi.optimizers import set_learning_rates

    config = tiny.settings("t", "p", "o", steps=10, lr_schedule="cosine", lr_warmup=1, student={"lr": 1.0}, fake={"lr": 10.0})
    rates = []
    for step in range(11):
        groups = {role: SimpleNamespace(param_groups=[{}]) for role in ("student", "fake")}
        set_learning_rates(SimpleNamespace(step=step, optimizers=groups), config)
        rates.append([groups[role].param_groups[0]["lr"] for role in ("student", "fake")])
    assert all(fake == pytest.approx(10 * student) for student, fake in rates)
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 10)) for step in range(11)]
    assert [student for student, _ in rates] == pytest.approx([0.5 * cosine[0], *cosine[1:]])
    assert rates[10][0] == pytest.approx(0.1)
