"""The order of runs, trials and measurements of a study, with pretended commands that leave small results."""

import json
from functools import partial

import pytest
from pretended import SECONDS, pretended

from raising import raises_naming
from wadi.distill.config_files import load_config
from wadi.study.cells import expand
from wadi.study.file import study_from
from wadi.study.folder import opened
from wadi.study.plan import Timing, describe, measure
from wadi.study.run import all_runs, plan, run_study
from wadi.study.tune import Choice, all_trials

BASE = {"teacher": "zoo", "prompts": "zoo", "steps": 10, "batch": 2, "student.lr": 1e-3}
WARM = {"warm_start.pairs": 4, "warm_start.steps": 4, "warm_start.fake_steps": 2}


def contents(**changes):
    """Return the contents of a study of two ranks and two seeds."""
    both = {"base": BASE, "grid": {"student.rank": [2, 4]}, "seeds": [0, 1], "analysis": False, "eval": {"metrics": ["fd"]}}
    return both | changes


def quiet(*_):
    pass


def test_cells_are_averaged_over_seeds_and_compared_at_equal_seeds(tmp_path):
    scores = {(2, 0): 5.0, (2, 1): 7.0, (4, 0): 4.0, (4, 1): 9.0}
    engine = pretended(score=lambda config: scores[config.student.rank, config.seed])
    run_study(study_from(contents(baseline="rank=4")), tmp_path / "out", engine, "ranks", quiet)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["cells"]["rank=2"]["fd zoo"] == {"mean": 6.0, "std": pytest.approx(2**0.5), "count": 2}
    (pair,) = (pair for pair in results["pairs"] if pair["value"] == "fd zoo")
    assert (pair["cell"], pair["mean"], pair["lower"], pair["higher"]) == ("rank=2", -0.5, 1, 1)
    assert pair["error"] == pytest.approx(1.5)  # of the differences 1 and -2


def test_a_finished_study_runs_nothing_again_and_a_seed_more_only_its_own(tmp_path):
    calls = []
    run_study(study_from(contents()), tmp_path / "out", pretended(calls), "ranks", quiet)
    assert calls == [(name, f"rank={r}--seed-{s}") for r in (2, 4) for s in (0, 1) for name in ("distill", "eval")]
    calls.clear()
    run_study(study_from(contents()), tmp_path / "out", pretended(calls), "ranks", quiet)
    assert calls == []
    run_study(study_from(contents(seeds=[0, 1, 2])), tmp_path / "out", pretended(calls), "ranks", quiet)
    assert {log for _, log in calls} == {"rank=2--seed-2", "rank=4--seed-2"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grid": {"student.rank": [2]}}, "rank=4"),
        ({"base": {**BASE, "student.lr": 0.5}}, "student.lr"),
        ({"eval": {"metrics": ["fd"], "count": 3}}, "eval.count"),
        ({"seeds": [1, 5]}, "seed 0"),
        ({"budget": {"steps": 9}}, "steps"),
        ({"tune": {"factors": [1, 2]}}, "tune.factors"),
        ({"analysis": True}, "analysis"),
    ],
)
def test_the_folder_of_another_study_is_refused_and_left_alone(changes, named, tmp_path):
    study, other = study_from(contents()), study_from(contents(**changes))
    plan(study, tmp_path / "out", pretended())
    plan(other, tmp_path / "out", pretended())  # before the first run, everything may change
    run_study(study, tmp_path / "out", pretended(), "ranks", quiet)
    before = (tmp_path / "out" / "study.json").read_text()
    with raises_naming(str(tmp_path / "out"), named):
        run_study(other, tmp_path / "out", pretended(), "ranks", quiet)
    assert (tmp_path / "out" / "study.json").read_text() == before


@pytest.mark.parametrize("text", ["[]", "{", '{"cells": 3, "seeds": []}', '{"cells": {}, "seeds": {}}'])
def test_a_damaged_file_of_a_study_is_named(text, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with raises_naming(str(tmp_path)):
        run_study(study_from(contents()), tmp_path, pretended(), "ranks", quiet)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with raises_naming(str(tmp_path), "notes.txt"):
        run_study(study_from(contents()), tmp_path, pretended(), "ranks", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_study_on_the_same_folder_is_refused(tmp_path):
    study = study_from(contents())
    with opened(tmp_path / "out", study, expand(study)), raises_naming(str(tmp_path / "out")):
        run_study(study, tmp_path / "out", pretended(), "twice", quiet)


def test_several_runs_at_once_give_the_same_results(tmp_path):
    one, two = (
        run_study(study_from(contents()), tmp_path / str(n), partial(pretended(), workers=n), "x", quiet) for n in (1, 2)
    )
    assert one == two


def test_a_budget_of_minutes_sets_the_steps_by_a_short_run(tmp_path):
    calls = []
    study = study_from(contents(base=BASE | WARM, budget={"minutes": 2}, seeds=[0]))
    rows = run_study(study, tmp_path / "out", pretended(calls), "time", quiet)
    # ten steps take 4 x 1 + 2 x 2 + 4 x 5 = 28 seconds, so 120 seconds are 42 steps, 17 of them warm and 8 of the fake model
    assert [row.values["steps"] for row in rows] == [42, 42]
    assert [row.values["minutes"] for row in rows] == [pytest.approx((17 * 1 + 8 * 2 + 17 * 5) / 60)] * 2
    assert [command for command, name in calls if name.endswith("--timing")] == ["distill", "eval", "eval", "distill"]


def test_a_plan_measures_each_phase_once_for_cells_of_equal_cost(tmp_path):
    calls, out = [], tmp_path / "out"
    study = study_from(contents(base=BASE | WARM, grid={"student.rank": [2, 4], "student.lr": [1e-3, 2e-3]}))
    text = plan(study, out, pretended(calls))
    assert [command for command, _ in calls] == ["distill", "eval", "eval", "distill"]
    assert len({name for _, name in calls}) == 2
    timing = measure(study, expand(study), out, pretended(calls))["rank=4,lr=0.002"]
    assert len(calls) == 4  # nothing was measured again
    assert timing.step == SECONDS
    assert timing.pair > 0
    assert text.splitlines()[-1].startswith("8 runs")


def test_a_plan_counts_hours_of_all_runs_and_trials(tmp_path):
    study = study_from(contents(tune={"factors": [0.5, 1, 2], "share": 0.5}))
    cells = expand(study)
    timing = Timing(step=(None, None, 90.0), around=30.0, after={"eval": 60.0})
    jobs = [*all_trials(study, cells, tmp_path), *((cell, job) for cell, _, job in all_runs(study, cells, tmp_path))]
    cell_of = {job.name: cell.name for cell, job in jobs}
    text = describe([job for _, job in jobs], {cell.name: timing for cell in cells}, cell_of, workers=2)
    trials, runs = 2 * 3 * (5 * 90 + 30 + 60), 2 * 2 * (10 * 90 + 30 + 60)
    assert f"10 runs, about {(trials + runs) / 3600 / 2:.2f} hours" in text


def test_the_runs_of_a_seed_share_their_pairs(tmp_path):
    out = tmp_path / "out"
    run_study(study_from(contents(base=BASE | WARM)), out, pretended(), "pairs", quiet)
    runs = [f"rank={rank}--seed-{seed}" for rank in (2, 4) for seed in (0, 1)]
    assert [(out / "runs" / name / "warm_start.safetensors").read_text() for name in runs] == ["0", "1", "0", "1"]
    assert len(list((out / "pairs").iterdir())) == 2


TUNE = {"tune": {"factors": [0.1, 1, 10], "seed": 7}, "grid": {"student.rank": [2]}, "seeds": [0]}


def test_a_setting_is_tuned_on_a_seed_of_its_own(tmp_path):
    calls, out = [], tmp_path / "out"
    engine = pretended(calls, score=lambda config: abs(config.student.lr - 1.2e-3))
    (row,) = run_study(study_from(contents(**TUNE)), out, engine, "tuned", quiet)
    trials = [f"rank=2--tune-{value}" for value in ("0.0001", "0.001", "0.01")]
    assert calls == [(command, name) for name in (*trials, "rank=2--seed-0") for command in ("distill", "eval")]
    assert [load_config(out / "runs" / name / "config.yaml").seed for name in trials] == [7, 7, 7]
    assert row.varied["student.lr"] == load_config(out / "runs" / "rank=2--seed-0" / "config.yaml").student.lr == 1e-3
    assert json.loads((out / "results.json").read_text())["tuned"]["rank=2"]["chosen"] == 1e-3

    # what was chosen stays, whatever becomes of the trials
    (out / "state" / f"{trials[0]}.json").unlink()
    calls.clear()
    run_study(study_from(contents(**{**TUNE, "seeds": [0, 1]})), out, engine, "tuned", quiet)
    assert calls == [("distill", "rank=2--seed-1"), ("eval", "rank=2--seed-1")]


def test_the_largest_value_is_chosen_where_more_is_better(tmp_path, monkeypatch):
    monkeypatch.setattr("wadi.study.tune.lower_is_better", lambda name: False)
    (row,) = run_study(study_from(contents(**TUNE)), tmp_path, pretended(score=lambda c: c.student.lr), "tuned", quiet)
    assert row.varied["student.lr"] == 1e-2
    assert "at the edge" in (tmp_path / "results.md").read_text()


def test_a_cell_that_cannot_run_is_reported_and_the_others_go_on(tmp_path):
    named = {"bad": {"student.target_modules": "nothing", "student.rank": 2}, "good": {"student.rank": 2}}
    study = contents(grid=None, cells=named, seeds=[0])
    study = {name: value for name, value in study.items() if value is not None}
    for changes in ({}, {"tune": TUNE["tune"]}, {"budget": {"minutes": 1}}):
        out = tmp_path / "-".join(["out", *changes])
        rows = run_study(study_from(study | changes), out, pretended(), "cells", quiet)
        assert [row.status for row in rows] == ["failed", "done"]
        assert "no layer is called nothing" in rows[0].error
        assert "no layer is called nothing" in (out / "results.md").read_text()
    text = plan(study_from(study), tmp_path / "out", pretended())
    assert "no layer is called nothing" in text
    assert text.splitlines()[-1].startswith("0 runs")


def test_a_choice_at_the_edge_is_known():
    assert Choice("student.lr", "fd", [1.0, 2.0, 4.0], [3.0, None, 5.0], chosen=1.0).at_edge
    assert not Choice("student.lr", "fd", [1.0, 2.0, 4.0], [3.0, 1.0, 5.0], chosen=2.0).at_edge
