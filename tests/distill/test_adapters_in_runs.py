"""Adapters by name in a run: what cannot work is one error before the teacher is loaded; optimisers see what is trained."""

import pytest
import torch

import tiny
from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.distill import setup
from wadi.distill.config import Adapter
from wadi.distill.optimizers import frozen, initial_state
from wadi.distill.setup import attach_roles
from wadi.roles import methods


def test_the_settings_name_every_adapter():
    assert set(Adapter.__args__) == set(methods.METHODS)


@pytest.mark.parametrize(
    ("role", "settings", "values"),
    [
        ("student", {"adapter": "dora2"}, ("dora2", "dora-frozen", "full")),
        ("fake", {"adapter": "full", "adapter_options": {"lora_alpha": 1}}, ("fake", "lora_alpha", "full")),
        ("student", {"adapter": "lora", "adapter_options": {"lora_alpha": "x"}}, ("lora_alpha", "x")),
        ("student", {"adapter": "hra", "rank": 3}, ("student.rank", 3)),
    ],
)
def test_unknown_names_end_before_the_teacher_is_loaded(role, settings, values, sd_folder, prompts_path, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "load_pipeline", lambda *_: pytest.fail("loaded"))
    with raises_naming(*values):
        setup.prepare(tiny.settings(sd_folder, prompts_path, tmp_path / "run", **{role: settings}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fake", ["lorad", "dora-frozen", "hra"])
def test_optimisers_train_what_is_not_frozen_and_freezing_a_role_gives_it_back(fake, sd_folder, prompts_path):
    linear = r".*attn\d\.to_q"
    changes = {role: {"adapter": name, "target_modules": linear} for role, name in (("student", "dora-frozen"), ("fake", fake))}
    config = tiny.settings(sd_folder, prompts_path, "o", **changes)
    backbone = from_pipeline(load_pipeline(sd_folder))
    attach_roles(backbone, config)
    network = backbone.network
    state = initial_state(network, config, torch.device("cpu"))
    for role in ("student", "fake"):
        trained = roles.trained_parameters(network, role)
        (group,) = state.optimizers[role].param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in trained.values()}
        assert not any("magnitude" in key for key in trained)
        with frozen(state, role):
            assert not roles.trained_parameters(network, role)
        assert roles.trained_parameters(network, role).keys() == trained.keys()


@pytest.mark.parametrize(("student", "rank", "allowed"), [("lora", 33, 32), ("lorad", 17, 16)])
def test_a_rank_above_that_of_every_layer_is_named(student, rank, allowed, sd_folder, prompts_path):
    settings = {"adapter": student, "rank": rank, "target_modules": r".*mid_block.*attn1\.to_q"}
    with raises_naming("student", rank, allowed):
        attach_roles(from_pipeline(load_pipeline(sd_folder)), tiny.settings(sd_folder, prompts_path, "o", student=settings))
