"""Studies of tiny runs: results, failures, continuation. Commands run in this process, except where one is killed."""

import csv
import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import partial

import pytest

from wadi.cli.main import main
from wadi.errors import WadiError
from wadi.study.cells import expand
from wadi.study.engines import in_process, run_here
from wadi.study.file import study_from
from wadi.study.folder import opened
from wadi.study.jobs import job_of, run_job
from wadi.study.run import run_study


def here(calls=None):
    """Run commands in this process; ``calls`` receives them."""

    def execute(words, log):
        if calls is not None:
            calls.append((words[0], log.stem))
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as stream, redirect_stderr(stream):
            return main(words)

    return partial(run_here, execute=execute)


def quiet(*_):
    pass


def test_a_study_gives_tables_figures_and_ordinary_runs(contents, tmp_path, capsys):
    calls, out = [], tmp_path / "out"
    contents |= {"seeds": [3], "swap": True}
    rows = run_study(study_from(contents), out, here(calls), "ranks", quiet)
    assert [(row.cell, row.seed, row.status) for row in rows] == [("rank=2", 3, "done"), ("rank=4", 3, "done")]
    assert [name for name, _ in calls] == ["distill", "eval", "analyze"] * 2
    small, large = (row.values for row in rows)
    assert small["parameters"] * 2 == large["parameters"]
    assert small["steps"] == 2
    assert small["direction_change"] > 0
    assert small["angle"] == pytest.approx((2 * small["direction_change"]) ** 0.5, rel=0.5)
    assert small["norm_change"] < small["norm_chance"]  # a rotation keeps norms
    hybrids = {name.partition(" with ")[2] for name in small if " with " in name}
    assert hybrids == {"teacher's norms", "teacher's directions"}
    with open(out / "runs.csv") as stream:
        assert [line["seed"] for line in csv.DictReader(stream)] == ["3", "3"]
    assert "rank=4" in (out / "results.md").read_text()
    assert "data:image/png" in (out / "results.html").read_text()
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert any(name.startswith("quality-fd") for name in names)
    assert "direction-change" in names
    assert main(["report", str(out / "runs" / "rank=2--seed-3")]) == 0


def test_the_error_of_a_command_is_the_one_that_it_printed(contents, tmp_path):
    study = study_from({**contents, "base": {**contents["base"], "teacher": str(tmp_path)}})
    cells = expand(study)
    with opened(tmp_path / "out", study, cells):
        state = run_job(job_of(study, tmp_path / "out", cells[0], 0, "one", evaluated=False), in_process())
    assert state.failed == "distill"
    assert str(tmp_path) in state.error
    assert not state.interrupted


def test_a_full_disk_ends_the_study_with_one_error(contents, tmp_path, full_disk, capsys):
    study = study_from({**contents, "seeds": [0], "analysis": False})
    with full_disk(100), pytest.raises(WadiError):
        run_study(study, tmp_path / "out", here(), "disk", quiet)
    with full_disk(20_000):  # settings and states fit, adapters do not
        rows = run_study(study, tmp_path / "out", here(), "disk", quiet)
    assert [row.status for row in rows] == ["failed", "failed"]
    assert {row.status for row in run_study(study, tmp_path / "out", here(), "disk", quiet)} == {"done"}


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_continues(contents, tmp_path, capsys):
    import yaml

    contents |= {"grid": {"student.rank": [2]}, "seeds": [0], "analysis": False}
    contents["base"] |= {"steps": 40, "checkpoint_every": 10}
    file, out = tmp_path / "long.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(contents))
    command = [sys.executable, "-m", "wadi", "study", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    checkpoints = out / "runs" / "rank=2--seed-0" / "checkpoints"
    end = time.monotonic() + 120
    while not any(path.name > "step-0000000" for path in checkpoints.glob("step-*")) and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    calls = []
    for _ in range(50):  # the training ends with the study
        saved = max(checkpoints.glob("step-*"))
        time.sleep(0.3)
        if saved == max(checkpoints.glob("step-*")):
            break
    (row,) = run_study(study_from(contents), out, here(calls), "long", quiet)
    assert row.status == "done"
    assert [name for name, _ in calls] == ["distill", "eval"]
    steps = [json.loads(line)["step"] for line in (out / "runs" / "rank=2--seed-0" / "stats.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_the_command_says_by_its_exit_code_that_runs_failed(contents, tmp_path, capsys, monkeypatch):
    import yaml

    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(contents))
    monkeypatch.setattr("wadi.study.engines.run_here", lambda jobs, workers: here()(jobs, workers))
    contents |= {"grid": {"student.target_modules": ["nothing_like_this", r".*to_q"]}, "seeds": [0], "analysis": False}
    file.write_text(yaml.safe_dump(contents))
    assert main(["study", str(file), "--out", str(tmp_path / "out")]) == 3
    assert "nothing_like_this" in capsys.readouterr().out
    assert main(["study", str(file), "--out", str(tmp_path / "out2"), "--cpus", "2"]) == 2
    assert main(["study", str(file), "--out", str(tmp_path / "out2"), "--jobs", "2", "--address", "auto"]) == 2
