"""Reading a study: every fault of the file is found before anything starts, and named."""

import pytest
import yaml

from raising import raises_naming
from wadi.errors import WadiError
from wadi.study.cells import expand, with_length
from wadi.study.file import read_study, study_from

BASE = {"preset": "demo", "student.rank": 4}


def study(**changes):
    values = {"base": BASE, "grid": {"student.adapter": ["lorad", "lora"]}, "seeds": [0, 1], **changes}
    return {name: value for name, value in values.items() if value is not None}


def cells(**changes):
    return expand(study_from(study(**changes)))


def test_the_grid_is_all_combinations_of_its_values():
    found = cells(grid={"student.adapter": ["lorad", "lora"], "student.lr": [1e-3, 2e-3]})
    assert [cell.name for cell in found] == [
        f"adapter={adapter},lr={lr}" for adapter in ("lorad", "lora") for lr in ("0.001", "0.002")
    ]
    assert [(cell.config.student.adapter, cell.config.student.lr) for cell in found][-1] == ("lora", 2e-3)
    assert all(cell.config.student.rank == 4 and cell.config.teacher == "zoo" for cell in found)


def test_named_cells_hold_several_settings_and_combine_with_the_grid():
    named = {"slow": {"student": {"lr": 1e-4}, "steps": 20}, "fast": {"student.lr": 1e-2}}
    found = cells(cells=named, grid={"student.rank": [2, 8]})
    assert [cell.name for cell in found] == ["slow,rank=2", "slow,rank=8", "fast,rank=2", "fast,rank=8"]
    assert [(cell.config.student.lr, cell.config.student.rank) for cell in found][1:3] == [(1e-4, 8), (1e-2, 2)]
    assert [cell.config.steps for cell in found] == [20, 20, 225, 225]


def test_a_setting_that_is_itself_a_mapping_or_a_list_may_be_varied():
    options, ranges = [{"lora_alpha": 4}, {"lora_alpha": 8}], [[0.02, 0.5], [0.5, 0.98]]
    found = cells(base={**BASE, "student.adapter": "lora"}, grid={"student.adapter_options": options, "t_range": ranges})
    assert [cell.config.student.adapter_options for cell in found][::2] == options
    assert [cell.config.t_range for cell in found][:2] == [(0.02, 0.5), (0.5, 0.98)]
    assert len({cell.name for cell in found}) == 4


def test_another_length_keeps_the_shares_of_the_warm_start():
    (one, _) = cells(budget={"steps": 450})
    assert (one.config.steps, one.config.warm_start.steps, one.config.warm_start.fake_steps) == (450, 260, 40)
    assert with_length(one.config, 45).warm_start.steps == 26


def test_the_names_of_folders_are_safe():
    found = cells(grid=None, cells={"../up": {"steps": 3}, "a b": {"steps": 4}, "a_b": {"steps": 5}})
    assert len({cell.name for cell in found}) == 3
    assert not any("/" in cell.name or " " in cell.name or cell.name.startswith(".") for cell in found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gird": {}}, ["gird", "grid"]),
        ({"grid": {}}, ["grid", "empty"]),
        ({"grid": None}, ["grid", "empty"]),
        ({"grid": {"student.rank": []}}, ["student.rank"]),
        ({"grid": {"student.rank": 8}}, ["student.rank", 8]),
        ({"grid": {"student.rnak": [8]}}, ["rnak", "student.rank"]),
        ({"grid": {"student.rank": [8, "many"]}}, ["rank=many", "student.rank", "many"]),
        ({"grid": {"student.rank": [8, -1]}}, ["rank=-1", "student.rank"]),
        ({"grid": {"student.rank": [8, 8]}}, ["rank=8"]),
        ({"grid": {"seed": [1, 2]}}, ["seed", "seeds"]),
        ({"grid": {"student.adapter": ["lorad", "loha"]}}, ["loha"]),
        ({"grid": {"objective": ["vsd", "gan"]}}, ["gan"]),
        ({"base": {**BASE, "objective_options": {"gan_weight": 1.0}}}, ["gan_weight"]),
        ({"base": {**BASE, "student.adapter_options": {"alpha": 1}}}, ["alpha"]),
        ({"base": {**BASE, "out": "x"}}, ["out", "'x'"]),
        ({"base": {"preset": "dmeo"}}, ["dmeo"]),
        ({"base": {"steps": 3}}, ["teacher"]),
        ({"base": [1]}, ["base"]),
        ({"cells": {"a": 3}}, ["cells.a", 3]),
        ({"cells": {"a": {"student.adapter": "oft"}}}, ["cells.a", "student.adapter"]),
        ({"grid": None, "cells": {"a": {"steps": 225}, "b": {}}}, ["'a'", "'b'"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [1, 1]}, ["seeds", 1]),
        ({"seeds": ["one"]}, ["seeds", "one"]),
        ({"seeds": [-4]}, [-4]),
        ({"eval": {"metrics": ["fdd"]}}, ["fdd"]),
        ({"eval": {"protocol": "nowhere.txt"}}, ["nowhere.txt"]),
        ({"eval": {"protocol": "coco2017-5k"}}, ["coco2017-5k", "reference"]),
        ({"eval": {"count": 0}}, ["count", 0]),
        ({"eval": {"counts": 4}}, ["counts", "eval.count"]),
        ({"analysis": "perhaps"}, ["analysis", "perhaps"]),
        ({"budget": {"steps": 10, "minutes": 2}}, ["steps", "minutes"]),
        ({"budget": {"minutes": 0}}, ["minutes", 0]),
        ({"budget": {"steps": 10}, "grid": {"steps": [10, 20]}}, ["steps", "budget"]),
        ({"tune": {"factors": [1.0]}}, ["factors", 1.0]),
        ({"tune": {"factors": [1.0, 1.0, 2.0]}}, ["factors", 2.0]),
        ({"tune": {"factors": [1.0, -2.0]}}, ["factors", -2.0]),
        ({"tune": {"factors": [1, 2], "seed": 1}}, ["tune.seed", 1]),
        ({"tune": {"factors": [1, 2], "setting": "student.rank"}}, ["student.rank", 4, "adapter=lorad"]),
        ({"tune": {"factors": [1, 2], "setting": "student.lrr"}}, ["student.lrr"]),
        ({"tune": {"factors": [1, 4], "setting": "student.ema"}, "base": {**BASE, "student.ema": 0.5}}, ["adapter=lorad", 2.0]),
        ({"tune": {"factors": [1, 2], "metric": "top1"}, "eval": {"metrics": ["fd"]}}, ["top1", "fd"]),
        ({"tune": {"factors": [1, 2], "metric": "pr"}}, ["pr", "fd"]),
        ({"tune": {"factors": [1, 2], "share": 0}}, ["tune.share", 0]),
        ({"swap": True, "analysis": False}, ["swap", "analysis"]),
        ({"baseline": "dora"}, ["dora", "adapter=lorad"]),
    ],
)  # fmt: skip
def test_a_fault_of_the_file_is_named(changes, named):
    with raises_naming(*named):
        cells(**changes)


def test_a_file_is_read_and_named_in_errors(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study()))
    assert len(expand(read_study(file))) == 2
    for text in ("- 1", "base: {preset: demo}\nseeds: [0]\ngrid: {}", "grid: {a: ["):
        file.write_text(text)
        with raises_naming(str(file)):
            read_study(file)
    with pytest.raises(WadiError):
        read_study(tmp_path / "absent.yaml")
