"""A wrong start is reported before any work, changes nothing, and the corrected command works."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from processes import finish, start
from runs import WARM, assert_same_run, at_steps, state_of, terminate
from wadi.distill import loop, preview, setup
from wadi.distill.loop import distill
from wadi.distill.objectives import with_defaults
from wadi.distill.run_folder import Run
from wadi.distill.setup import attach_roles
from wadi.errors import Interrupted, WadiError


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def stopped(sd_folder, prompts_path, tmp_path_factory):
    """``(config, folder)`` of a run stopped at step 2 of 3."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path_factory.mktemp("stopped") / "run", batch=2)
    with pytest.MonkeyPatch.context() as patch:
        at_steps(patch, [1], terminate)
        with pytest.raises(Interrupted):
            distill(config)
    return config


@pytest.mark.parametrize(
    "change", [{"batch": 3}, {"prompts": "other"}, {"teacher": "other"}], ids=lambda change: next(iter(change))
)
def test_a_start_with_other_settings_changes_nothing(change, stopped, prompts_path, tmp_path):
    if "prompts" in change:
        (tmp_path / "p.txt").write_text("one\n")
        change = {"prompts": str(tmp_path / "p.txt")}
    if "teacher" in change:
        tiny.stable_diffusion(tmp_path / "parts", seed=1).save_pretrained(tmp_path / "other")
        change = {"teacher": str(tmp_path / "other")}
    before = contents(Path(stopped.out))
    with pytest.raises(WadiError):
        distill(dataclasses.replace(stopped, **change))
    assert contents(Path(stopped.out)) == before


def test_fewer_steps_than_a_run_has_change_nothing(stopped, capsys):
    before = contents(Path(stopped.out))
    assert distill(dataclasses.replace(stopped, steps=1)) == Path(stopped.out)
    assert contents(Path(stopped.out)) == before
    assert "2 steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("where", ["/proc/run", "/dev/null/run", "FILE/run", "/" + "x" * 300, "x" * 5000])
def test_an_unwritable_folder_is_named_before_the_teacher_is_loaded(where, sd_folder, prompts_path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(setup, "load_pipeline", lambda *a: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WadiError, match=r"x{100}|run"):
        distill(tiny.settings(sd_folder, prompts_path, where.replace("FILE", str(tmp_path / "file"))))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_start_that_failed_takes_a_corrected_command(sd_folder, prompts_path, tmp_path, monkeypatch):
    """After the first checkpoint other settings are an error. Before it, they start the run anew."""
    first = tiny.settings(sd_folder, prompts_path, tmp_path / "run", warm_start=WARM, batch=3, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *a: (_ for _ in ()).throw(WadiError("no")))
        with pytest.raises(WadiError, match="no"):
            distill(first)
    assert (tmp_path / "run" / "warm_start.safetensors").exists()
    corrected = dataclasses.replace(first, seed=5, guidance_scale=2.0)
    distill(corrected)
    distill(dataclasses.replace(corrected, out=str(tmp_path / "straight")))
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    with pytest.raises(WadiError, match="seed"):
        distill(first)


def test_a_stop_before_the_first_step_allows_other_settings(sd_folder, prompts_path, tmp_path, monkeypatch):
    first = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=2, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(preview, "many_steps", lambda *a: terminate() or a[-1]())
        with pytest.raises(Interrupted, match="0"):
            distill(first)
    distill(dataclasses.replace(first, seed=5))
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "straight", steps=2, seed=5))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("left", [".config.yaml.1234.wadi.tmp", ".lock", "samples", ".DS_Store"])
def test_files_of_a_killed_start_do_not_block_the_next(left, sd_folder, prompts_path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).mkdir() if left == "samples" else (tmp_path / "run" / left).touch()
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1))
    assert state_of(tmp_path / "run")[1]["step"] == 1


@pytest.mark.parametrize("role", ["student", "fake"])
def test_a_rank_above_the_largest_layer_is_named_before_it_is_allocated(role, sd_folder, prompts_path, monkeypatch):
    from wadi import roles
    from wadi.backbones import from_pipeline, load_pipeline

    backbone = from_pipeline(load_pipeline(sd_folder))
    monkeypatch.setattr(roles, "attach", lambda *a: pytest.fail("allocated"))
    with pytest.raises(WadiError, match=rf"{role}\.rank is 65536\b"):
        attach_roles(backbone, tiny.settings(sd_folder, prompts_path, "o", **{role: {"rank": 65_536}}))


def test_the_largest_rank_is_that_of_the_largest_layer(sd_folder):
    from torch import nn

    from wadi.lorad.angles import largest_rank

    model = nn.ModuleDict(
        {"a": nn.Linear(12, 5), "b": nn.Conv2d(4, 16, 3), "c": nn.Linear(6, 100), "d": nn.Conv2d(8, 40, 1, groups=2)}
    )
    assert [largest_rank(model, name) for name in ("a", "b", "c", "d", "a|b", "x")] == [5, 16, 3, 2, 16, None]


# --- several processes --------------------------------------------------------------------------------------------------------


def failing(config, who, how, index):
    """`distilled`, where process ``who`` cannot load the teacher (or, as the first, cannot write its grid)."""
    from processes import distilled

    def fail(*arguments):
        raise WadiError("cannot load") if how == "load" else RuntimeError("a defect")

    if index == who:
        module, name = {"load": (setup, "load_pipeline"), "grid": (loop, "save_png")}[how]
        setattr(module, name, fail)
    try:
        return distilled(config, index)
    except RuntimeError:
        return 3


@pytest.mark.parametrize(("who", "how", "codes"), [(0, "load", [2, 2]), (1, "load", [2, 2]), (0, "grid", [3, 2])])
def test_where_one_process_fails_the_others_end_with_an_error(who, how, codes, sd_folder, prompts_path, tmp_path):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", batch=1)
    assert finish(start(2, failing, config, who, how, log=tmp_path / "log"), seconds=60) == codes
    assert "ended" in (tmp_path / f"log-{1 - who}").read_text() or "first process" in (tmp_path / f"log-{1 - who}").read_text()


def test_an_unwritable_place_ends_all_processes(sd_folder, prompts_path, tmp_path):
    from processes import distilled

    config = tiny.settings(sd_folder, prompts_path, "/proc/run", batch=1)
    assert finish(start(2, distilled, config, log=tmp_path / "log"), seconds=60) == [2, 2]
    assert "/proc/run" in (tmp_path / "log-0").read_text()


# --- skipped steps ------------------------------------------------------------------------------------------------------------


def test_skipped_steps_are_counted_across_a_resume_and_bounded(sd_folder, prompts_path, tmp_path, monkeypatch):
    """The run ends at the third skipped step in a row, also across a stop. The total count goes on after a resume."""
    from wadi.distill.objectives import vsd

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=9, max_skipped=3)
    plain = vsd.vsd_gradient
    monkeypatch.setattr(vsd, "vsd_gradient", lambda *a: plain(*a) * float("nan"))
    with monkeypatch.context() as patch:
        at_steps(patch, [1], terminate)
        with pytest.raises(Interrupted, match="2"):
            distill(config)
    skipped = state_of(tmp_path / "run")[1]
    assert (skipped["skipped"], skipped["skipped_in_a_row"]["student"]) == (2, 2)
    with pytest.raises(WadiError, match=r"student.*\b3\b.*\b2\b"):
        distill(config)
    with monkeypatch.context() as patch:
        patch.setattr(vsd, "vsd_gradient", plain)
        distill(dataclasses.replace(config, steps=3))
    after = state_of(tmp_path / "run")[1]
    assert (after["skipped"], after["skipped_in_a_row"]["student"], after["step"]) == (2, 0, 3)
    assert [line["skipped"] for line in Run(with_defaults(dataclasses.replace(config, steps=3))).rewind(3)] == [1, 2, 2]


def test_stats_lines_have_steps_times_and_speeds(sd_folder, prompts_path, tmp_path):
    """Steps and times increase; images per second are all images of a step over its time."""
    from wadi.distill.run_folder import read_stats

    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=3, batch=2, accumulate=2))
    lines = read_stats(run / "stats.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    seconds = [0.0, *(line["seconds"] for line in lines)]
    for line, before, after in zip(lines, seconds, seconds[1:], strict=False):
        assert line["images_per_second"] == pytest.approx(4 / (after - before), rel=1e-6)
        assert line["peak_memory_mib"] > 0
    assert torch.tensor(seconds).diff().min() > 0
    assert all(os.path.exists(run / "samples" / f"step-000000{n}.png") for n in (0, 3))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"teacher_steps": 30}, "teacher_steps is 30"), ({"warm_start": {**WARM, "sampler_steps": 21}}, "sampler_steps is 21")],
)
def test_more_sampler_steps_than_the_schedule_has_are_named_before_the_folder_exists(
    change, named, sd_folder, prompts_path, tmp_path
):
    teacher = tmp_path / "short"
    shutil.copytree(sd_folder, teacher)
    path = teacher / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 20}))
    config = tiny.settings(teacher, prompts_path, tmp_path / "run", student={"timesteps": [15]}, **change)
    with pytest.raises(WadiError, match=named):
        distill(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "said"), [(3, True), (4, False)])
def test_a_run_that_is_all_warm_start_says_so(steps, said, sd_folder, prompts_path, tmp_path, capsys):
    warm = {**WARM, "steps": 2, "fake_steps": 1}
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", warm_start=warm, steps=steps))
    assert ("nothing is distilled" in capsys.readouterr().err) == said
