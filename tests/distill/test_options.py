"""Settings of a run that change speed and memory, not its result."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

import tiny
from runs import assert_same_run, at_steps, state_of, terminate
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.distill.batch import Batch
from wadi.distill.loop import distill
from wadi.distill.objectives import make_objective
from wadi.distill.optimizers import initial_state
from wadi.distill.setup import attach_roles
from wadi.distill.step import train_step
from wadi.errors import Interrupted, WadiError


def test_checkpointed_blocks_are_computed_again_and_nothing_frozen_has_a_gradient(sd_folder, prompts_path):
    """Each block of the student's pass once more in the backward pass; without, only once."""
    passes = {}
    for on in (False, True):
        config = tiny.settings(sd_folder, prompts_path, "o", gradient_checkpointing=on)
        backbone = from_pipeline(load_pipeline(sd_folder))
        attach_roles(backbone, config)
        state, calls = initial_state(backbone.network, config, torch.device("cpu")), []
        backbone.network.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(torch.is_grad_enabled())
        )
        z = torch.randn(2, *backbone.latent_shape)
        batch = Batch(backbone.encode(["red apple", "blue car"]), backbone.encode([""]), z, z[:0])
        train_step(backbone, batch, [700], make_objective(config), config, state)
        passes[on] = len(calls)
        own = {id(p) for role in ("student", "fake") for p in roles.parameters(backbone.network, role).values()}
        assert all(p.grad is None and not p.requires_grad for p in backbone.network.parameters() if id(p) not in own)
    assert passes[False] == 4  # student, teacher, fake model, and the fake model's own loss
    assert passes[True] == 4 + 2


def test_8_bit_moments_need_their_library(sd_folder, prompts_path, tmp_path, monkeypatch):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", optimizer="adamw8bit", steps=1)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(WadiError, match="bitsandbytes"):
        distill(config)
    assert not (tmp_path / "run").exists()
    optimizers = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, *arguments, **settings):
            optimizers.append(settings)
            super().__init__(*arguments, **settings)

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    distill(config)
    assert [settings["lr"] for settings in optimizers] == [config.student.lr, config.fake.lr]


def test_a_run_with_8_bit_moments_resumes_bit_for_bit(sd_folder, prompts_path, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="extra 8bit")
    changes = {"optimizer": "adamw8bit", "steps": 4, "student": {"rank": 32}}
    straight, broken = (tiny.settings(sd_folder, prompts_path, tmp_path / name, **changes) for name in ("straight", "broken"))
    distill(straight)
    at_steps(monkeypatch, [1], terminate)
    with pytest.raises(Interrupted):
        distill(broken)
    distill(broken)
    tensors, _ = state_of(tmp_path / "straight")
    assert any(tensor.dtype == torch.uint8 and tensor.numel() >= 4096 for tensor in tensors.values())
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


def test_sharding_needs_several_processes(sd_folder, prompts_path, tmp_path):
    with pytest.raises(WadiError, match="shard"):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", shard=True))
    assert not (tmp_path / "run").exists()


def test_tf32_is_off_by_default(sd_folder, prompts_path, tmp_path):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "on", steps=1, tf32=True)
    distill(config)
    assert torch.get_float32_matmul_precision() == "high"
    distill(dataclasses.replace(config, out=str(tmp_path / "off"), tf32=False))
    assert torch.get_float32_matmul_precision() == "highest"


def test_more_images_than_prompts(sd_folder, tmp_path):
    (tmp_path / "p.txt").write_text("red apple\n")
    run = distill(tiny.settings(sd_folder, tmp_path / "p.txt", tmp_path / "run", steps=1, batch=3, accumulate=2))
    assert state_of(run)[1]["drawn"] == 6


@pytest.mark.slow
def test_a_compiled_run_has_no_graph_breaks_and_equals_the_plain_run(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Each role and batch size is traced once, without a break, and none falls back to plain code."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=backend, fullgraph=True))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    warm = {"pairs": 4, "sampler_steps": 2, "steps": 1, "fake_steps": 1, "weight": 0.5}
    changes = {"steps": 4, "batch": 4, "warm_start": warm, "sample_every": 2}
    configs = [tiny.settings(sd_folder, prompts_path, tmp_path / str(on), compile=on, **changes) for on in (False, True)]
    for config in configs:
        distill(config)
    assert len(graphs) > 3
    (tensors, _), (others, _) = (state_of(tmp_path / str(on)) for on in (False, True))
    for name, value in tensors.items():
        if "lorad" in name:
            torch.testing.assert_close(others[name], value, rtol=2e-3, atol=2e-5)
