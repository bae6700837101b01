"""An objective added by a user: its page, its optimum, and a run with it, as for ours."""

from dataclasses import replace
from pathlib import Path

import pytest
import sim
import torch
from exact_scores import COVARIANCE, MEAN, Toy, off, teacher_of_a_gaussian, trained

import tiny
import wadi
from raising import raises_naming
from runs import stats_of
from wadi.distill.loop import distill
from wadi.distill.objectives.base import Loss

PAGE = (Path(__file__).parents[2] / "docs" / "add-an-objective.md").read_text()


def test_the_page_shows_this_file():
    code = Path(sim.__file__).read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in PAGE


def test_the_run_of_the_page_trains(monkeypatch, tmp_path):
    (block,) = (code for code in PAGE.split("```python\n")[1:] if code.startswith("from dataclasses import replace"))
    runs = []
    monkeypatch.setattr(wadi, "distill", runs.append, raising=False)
    exec(block.split("```")[0], {})  # the page is a file of this repository
    (config,) = runs
    warm = replace(config.warm_start, pairs=0, steps=0, fake_steps=0, weight=0.0)
    short = replace(config, out=str(tmp_path / "run"), steps=1, batch=2, warm_start=warm, sample_prompts=("pear",))
    assert "sim_length" in stats_of(distill(replace(short, lr_warmup=0)))[-1]


def test_its_optimum_is_the_teachers_distribution():
    found = trained(Toy(teacher_of_a_gaussian), "sim")
    assert off(found, (MEAN, COVARIANCE)) < 0.03, found


def test_a_run_trains_with_it_and_reports_its_statistics(sd_folder, prompts_path, tmp_path):
    options = {"huber": 0.2}
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", objective="sim", objective_options=options, steps=2)
    last = stats_of(distill(config))[-1]
    assert last["sim_length"] >= 0.2
    assert torch.isfinite(torch.tensor(last["loss_student"]))


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_its_options_are_checked(sd_folder, prompts_path, tmp_path, value):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", objective="sim", objective_options={"huber": value})
    with raises_naming("objective_options.huber", value):
        distill(config)


def test_a_wrong_sign_is_noticed(monkeypatch):
    plain = sim.SIM.student_loss
    monkeypatch.setattr(sim.SIM, "student_loss", lambda self, *rest: Loss(-plain(self, *rest).value))
    assert not off(trained(Toy(teacher_of_a_gaussian), "sim", steps=200), (MEAN, COVARIANCE)) < 0.1
