"""The studies of the repository: each can be planned, and says what it claims to say."""

from pathlib import Path

import pytest
from pretended import pretended

from wadi.cli.main import main
from wadi.study.cells import expand
from wadi.study.collect import trained_parameters
from wadi.study.file import read_study

STUDIES = Path(__file__).parents[2] / "studies"
FILES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
CLAIMS = [name for name in FILES if name != "adapters-quick"]
TRAININGS = {
    "adapters-paper": 66, "adapters-paper-time": 36, "adapters-quick": 4, "adapters-recipe": 60, "adapters-recipe-time": 36,
    "directions": 24, "pairing": 18, "parameters": 48, "rank": 36,
}  # fmt: skip


def study(name):
    return read_study(STUDIES / f"{name}.yaml")


def shares(name):
    """Return the share of the network that each cell trains."""
    return {cell.name: trained_parameters(cell.config)["share"] for cell in expand(study(name))}


@pytest.mark.parametrize("name", FILES)
def test_a_study_can_be_planned(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wadi.study.engines.run_here", lambda jobs, workers: pretended()(jobs, workers))
    assert main(["study", str(STUDIES / f"{name}.yaml"), "--out", str(tmp_path / "out"), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{TRAININGS[name]} runs, about" in lines[-1]
    assert not any("cannot run" in line for line in lines)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_has_equal_trials_and_three_other_seeds(name):
    of = study(name)
    assert len(of.seeds) == 3
    assert of.tune.seed not in of.seeds
    assert (of.tune.setting, of.tune.metric, len(of.tune.factors)) == ("student.lr", "fd", 3)
    assert {cell.config.teacher for cell in expand(of)} == {"zoo"}


@pytest.mark.parametrize(
    "name", [name for name in CLAIMS if name not in ("directions", "adapters-paper-time", "adapters-recipe-time")]
)
def test_all_cells_have_the_same_number_of_steps(name):
    assert len({(cell.config.steps, cell.config.batch, cell.config.warm_start) for cell in expand(study(name))}) == 1


@pytest.mark.parametrize("name", ["adapters-paper-time", "adapters-recipe-time"])
def test_equal_time_has_the_cells_of_equal_rank(name):
    rank = {cell.name: cell.config.student for cell in expand(study(name.removesuffix("-time")))}
    time = {cell.name: cell.config.student for cell in expand(study(name))}
    assert time == {cell: student for cell, student in rank.items() if not cell.endswith("-equal")}


@pytest.mark.parametrize(("name", "share"), [("adapters-paper", 0.035), ("adapters-recipe", 0.0968)])
def test_cells_of_equal_parameters_are_equal(name, share):
    own = {cell: of for cell, of in shares(name).items() if cell.endswith("-equal")}
    assert len(own) >= 4
    assert own == {cell: pytest.approx(share, rel=0.04) for cell in own}


def test_the_numbers_in_the_cells_of_parameters_are_percentages():
    assert {cell: pytest.approx(int(cell.partition(",")[2]), rel=0.05) for cell in shares("parameters")} == {
        cell: 100 * share for cell, share in shares("parameters").items()
    }


def test_directions_are_of_students_with_all_weights_trained_without_regression():
    of = study("directions")
    assert of.swap
    for cell in expand(of):
        assert cell.config.student.adapter == "full"
        assert cell.config.warm_start.pairs == 0
        assert trained_parameters(cell.config)["share"] > 0.95
