"""A run survives being killed at any moment, being started twice, and a clock that goes backwards."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from processes import distilled, distilled_on_a_full_disk, finish, free_port, start
from runs import assert_same_run, state_of
from wadi.distill import checkpoint_folders
from wadi.distill.loop import distill
from wadi.distill.run_folder import LOCK, Run
from wadi.errors import WadiError
from wadi.io import records

KILLS = 20


@pytest.mark.slow
def test_killed_at_20_random_moments_it_is_the_uninterrupted_run_to_the_bit(sd_folder, prompts_path, tmp_path):
    """It saves at every step, so that many of the moments lie within a save, and never finds a checkpoint that is not whole."""
    long = {"steps": 400, "checkpoint_every": 1, "sample_seeds": 1, "keep_checkpoints": 2, "keep_every": 50}
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "killed", **long)
    moments, kills, midst, steps = random.Random(0), 0, 0, []
    while kills < KILLS:
        before = steps[-1] if steps else 0
        (process,) = start(1, distilled, config, log=tmp_path / "log")
        until = time.monotonic() + 120
        while newest(tmp_path / "killed") <= before and process.is_alive() and time.monotonic() < until:
            time.sleep(0.01)  # it got somewhere
        time.sleep(moments.uniform(0, 0.4))
        assert process.is_alive(), (tmp_path / "log-0").read_text()
        process.kill()
        process.join()
        kills += 1
        found, complaints = checkpoint_folders.latest(tmp_path / "killed" / "checkpoints")
        assert complaints == []
        steps.append(checkpoint_folders.step_of(found))
        midst += bool(list((tmp_path / "killed").glob("**/.*.tmp")))
    assert steps == sorted(set(steps))  # no kill lost a saved step
    assert midst > 0  # some hit a save
    end = newest(tmp_path / "killed") + 2
    short = {**long, "steps": end}
    settings = tmp_path / "killed" / "config.yaml"
    settings.write_text(settings.read_text().replace("steps: 400", f"steps: {end}"))
    ends = [tiny.settings(sd_folder, prompts_path, tmp_path / name, **short) for name in ("killed", "straight")]
    assert [finish(start(1, distilled, config, log=tmp_path / "end")) for config in ends] == [[0], [0]]
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("**/.*.tmp"))


def newest(run):
    """The newest checkpoint's step."""
    found = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(found, default=0)


def test_the_last_and_every_so_many_th_checkpoints_stay(sd_folder, prompts_path, tmp_path):
    changes = {"steps": 7, "checkpoint_every": 1, "keep_checkpoints": 2, "keep_every": 3}
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", **changes))
    assert sorted(checkpoint_folders.step_of(path) for path in (run / "checkpoints").iterdir()) == [3, 6, 7]


def holding(config, index):
    with Run(config).locked():
        print("held", flush=True)
        time.sleep(600)


def test_two_runs_on_one_folder(sd_folder, prompts_path, tmp_path):
    """The second is refused with the first one's process; a lock that a dead process left is taken over."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    (process,) = start(1, holding, config, log=tmp_path / "log")
    try:
        until = time.monotonic() + 60
        while "held" not in (tmp_path / "log-0").read_text() if (tmp_path / "log-0").exists() else True:
            assert time.monotonic() < until
            time.sleep(0.02)
        with pytest.raises(WadiError, match=rf"Another run is writing into .*process {process.pid} on"):
            distill(config)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK}
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert (tmp_path / "run" / LOCK).exists()
    distill(config)
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_is_given_back_whatever_happens(sd_folder, prompts_path, tmp_path):
    run = Run(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked(), pytest.raises(WadiError, match="Another run"), run.locked():
        pass
    with run.locked():
        pass


def test_a_run_of_millions_of_steps_is_continued(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Its statistics are larger than any other file that is read whole."""
    run = Run(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    run.open()
    monkeypatch.setattr(records, "JSON_BYTES", 100)
    for step in range(1, 20):
        run.log({"step": step})
    assert run.rewind(15) == [{"step": step} for step in range(1, 16)]


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_and_used(sd_folder, prompts_path, tmp_path, monkeypatch, capsys, answer):
    """Some network file systems are mounted without locks."""
    import fcntl

    def refuse(*_):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", refuse)
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "student").is_dir()
    assert not (tmp_path / "run" / LOCK).exists()
    assert "without locks" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_not_a_file_is_not_followed(sd_folder, prompts_path, tmp_path, kind):
    run, victim = Run(tiny.settings(sd_folder, prompts_path, tmp_path / "run")), tmp_path / "victim"
    victim.write_text("mine")
    run.folder.mkdir()
    lock = run.folder / LOCK
    {"link": lambda: lock.symlink_to(victim), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(WadiError, match=str(run.folder)), run.locked():
        pass
    assert victim.read_text() == "mine"
    assert os.path.lexists(lock)


def test_a_file_of_the_users_in_an_adapters_folder_stays(sd_folder, prompts_path, tmp_path):
    """It is named before the first step, and the run goes on when it is out of the way."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    distill(config)
    mine = tmp_path / "run" / "student" / "notes.txt"
    mine.write_text("mine")
    longer = dataclasses.replace(config, steps=2)
    with pytest.raises(WadiError, match=r"notes\.txt"):
        distill(longer)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "run" / LOCK).exists()
    mine.unlink()
    distill(longer)


def test_leftovers_of_a_killed_save_go_with_the_next_run(sd_folder, prompts_path, tmp_path):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    distill(config)
    before = sorted((tmp_path / "run").rglob("*"))
    for leftover in (
        ".student.123.old",
        ".fake.abc.tmp",
        "checkpoints/.step-0000000.doomed",
        "checkpoints/.step-09.7.tmp",
    ):
        (tmp_path / "run" / leftover / "student").mkdir(parents=True)
    distill(config)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_clock_that_goes_backwards(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Nothing that is kept, found or told depends on the time of day."""
    configs = [tiny.settings(sd_folder, prompts_path, tmp_path / name, checkpoint_every=1) for name in ("plain", "odd")]
    distill(configs[0])
    hours, plain = iter(range(10**6, 0, -1)), os.replace

    def replace(source, target):
        plain(source, target)
        then = next(hours) * 3600
        os.utime(target, (then, then))

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(hours) * 3600.0)
        patch.setattr(os, "replace", replace)
        distill(configs[1])
    assert checkpoint_folders.latest(tmp_path / "odd" / "checkpoints")[0].name == "step-0000003"
    assert_same_run(tmp_path / "plain", tmp_path / "odd")


def test_a_run_of_constant_rate_may_be_lengthened(sd_folder, prompts_path, tmp_path):
    short = tiny.settings(sd_folder, prompts_path, tmp_path / "grown", steps=2)
    distill(short)
    distill(dataclasses.replace(short, steps=4))
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "whole", steps=4))
    (angles, plain), (others, other_plain) = state_of(tmp_path / "grown"), state_of(tmp_path / "whole")
    assert plain == other_plain
    assert all(torch.equal(value, others[name]) for name, value in angles.items())
    cosine = dataclasses.replace(short, out=str(tmp_path / "cosine"), lr_schedule="cosine")
    distill(cosine)
    with pytest.raises(WadiError, match="steps: 2 -> 4"):
        distill(dataclasses.replace(cosine, steps=4))


def test_a_run_is_used_and_continued_from_any_folder(sd_folder, prompts_path, tmp_path, monkeypatch):
    from wadi.pipelines.load import load

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    monkeypatch.chdir(sd_folder.parent)
    distill(dataclasses.replace(config, teacher=sd_folder.name))
    monkeypatch.chdir(tmp_path)
    load(tmp_path / "run")
    distill(config)  # the same teacher by its whole path: not another config


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_while_a_grid_is_written(world, sd_folder, prompts_path, tmp_path):
    """Every process ends with a line, the checkpoint before stays, and with room again the run goes on from it."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=2)
    distill(config)
    grid = min((tmp_path / "run" / "samples").iterdir())
    longer = dataclasses.replace(config, steps=3, batch=config.batch // world)
    size = grid.stat().st_size - 1
    assert size > max((tmp_path / "run" / name).stat().st_size for name in ("config.yaml", "stats.jsonl"))
    assert finish(start(world, distilled_on_a_full_disk, longer, size, log=tmp_path / "log")) == [2] * world
    told = [(tmp_path / f"log-{index}").read_text() for index in range(world)]
    assert "Cannot write" in told[0]
    assert "samples" in told[0]
    assert all("Traceback" not in text for text in told), told
    last, complaints = checkpoint_folders.latest(tmp_path / "run" / "checkpoints")
    assert (last.name, complaints) == ("step-0000002", [])
    assert finish(start(world, distilled, longer, log=tmp_path / "again")) == [0] * world
    assert checkpoint_folders.latest(tmp_path / "run" / "checkpoints")[0].name == "step-0000003"


@pytest.mark.slow
def test_a_launcher_that_is_told_to_end_lets_the_run_save(sd_folder, prompts_path, tmp_path):
    from wadi.distill.config_files import save_config

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=100_000, batch=1)
    save_config(config, tmp_path / "c.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    launched = subprocess.Popen([*command, "-m", "wadi", "distill", "--config", str(tmp_path / "c.yaml")])
    stats, until = tmp_path / "run" / "stats.jsonl", time.monotonic() + 300
    while not (stats.exists() and len(stats.read_text().splitlines()) >= 2):
        assert launched.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(120) != 0
    found, complaints = checkpoint_folders.latest(tmp_path / "run" / "checkpoints")
    assert complaints == []
    assert checkpoint_folders.step_of(found) == len(stats.read_text().splitlines()) > 1
