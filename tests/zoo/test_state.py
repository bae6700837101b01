"""Stages save all they need, whole or not at all, and go on exactly where they stopped."""

import pytest
import torch
from torch import nn

from raising import raises_naming
from wadi.zoo.recipe.optim import Muon, groups_of, orthogonalise
from wadi.zoo.recipe.state import Average, Budget, load_tensors, resume_run, save_run, save_tensors


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def parts():
    model = network()
    return model, Muon(groups_of(model, 0.02, 1e-3), lr=0.02), Average(model, 0.99)


def steps(model, optimiser, average, first, last):
    for step in range(first, last):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        average.update(model)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    whole = parts()
    steps(*whole, 0, 6)
    first = parts()
    steps(*first, 0, 3)
    save_run(tmp_path / "run.safetensors", *first, elapsed=1.5)
    second = parts()
    note = resume_run(tmp_path / "run.safetensors", *second)
    assert note is not None
    assert note["elapsed"] == 1.5
    steps(*second, 3, 6)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], value)
    for name, value in whole[2].values.items():
        assert torch.equal(second[2].values[name], value)


def test_nothing_to_resume_is_no_error(tmp_path):
    assert resume_run(tmp_path / "run.safetensors", *parts()) is None


def test_adam_of_torch_resumes_too(tmp_path):
    def make():
        model = network()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), Average(model, 0.9)

    whole, first, second = make(), make(), make()
    steps(*whole, 0, 4)
    steps(*first, 0, 2)
    save_run(tmp_path / "run.safetensors", *first)
    resume_run(tmp_path / "run.safetensors", *second)
    steps(*second, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 64, lambda data: b""])
def test_a_damaged_file_is_named_in_the_error(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(8)})
    path.write_bytes(damage(path.read_bytes()))
    with raises_naming(path):
        load_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with raises_naming(tmp_path / "none.safetensors"):
        load_tensors(tmp_path / "none.safetensors")


def test_rate_warms_up_then_falls_to_zero_and_counts_earlier_time():
    rates = [Budget(1.0, elapsed=60 * u).rate(0.1) for u in (0.0, 0.05, 0.1, 0.5, 1.0)]
    assert rates[0] < 1e-4
    assert rates[1] == pytest.approx(0.5 * 0.99384, abs=1e-3)
    assert rates[3] == pytest.approx(0.5, abs=1e-3)
    assert rates[4] == 0
    assert Budget(1.0, elapsed=90).fraction == 1
    with raises_naming("0 minutes"):
        Budget(0)


def test_average_of_a_constant_is_that_constant():
    model = network()
    average = Average(model, 0.9)
    for value in average.values.values():
        value.zero_()
    for _ in range(200):
        average.update(model)
    for name, parameter in model.named_parameters():
        assert torch.allclose(average.values[name], parameter, rtol=1e-4)


@pytest.mark.parametrize("shape", [(16, 27), (27, 16), (12, 12), (64, 8)])
def test_orthogonalise_keeps_the_directions_and_evens_the_lengths(shape):
    m = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _s, vt = torch.linalg.svd(m, full_matrices=False)
    inner = u.mT @ orthogonalise(m, steps=8) @ vt.mT  # diagonal if the singular directions are kept
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-5
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3


def test_orthogonalise_agrees_with_the_plain_iteration_and_treats_each_alone():
    m = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one, whole in zip(m, orthogonalise(m), strict=True):
        x = one / one.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        assert torch.allclose(whole, x, atol=1e-9)


def test_muon_moves_weights_and_adam_the_rest():
    model = nn.ModuleDict({"inner": nn.Linear(8, 8), "conv_out": nn.Linear(8, 2), "token_embedding": nn.Embedding(4, 8)})
    muon, adam = groups_of(model, 0.1, 0.2)
    assert [id(p) for p in muon["params"]] == [id(model["inner"].weight)]
    assert len(adam["params"]) == 4
    assert (muon["muon"], muon["peak"], adam["muon"], adam["peak"]) == (True, 0.1, False, 0.2)


def test_adam_part_agrees_with_torch():
    ours, theirs = network(), network()
    groups = [{"params": list(ours.parameters()), "muon": False}]
    pairs = [(ours, Muon(groups, lr=1e-2)), (theirs, torch.optim.Adam(theirs.parameters(), 1e-2, betas=(0.9, 0.99)))]
    for model, optimiser in pairs:
        steps(model, optimiser, Average(model, 0.9), 0, 5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
