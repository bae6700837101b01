"""The best matrices of a rank, against direct formulas."""

import pytest
import torch
from torch import nn

from raising import raises_naming
from wadi.convert.changes_as_lora import approximate
from wadi.convert.low_rank import nearest
from wadi.convert.moments import collected, groups


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 2, 3, 3)])
def test_without_moments_it_is_the_truncated_svd(shape):
    dW = random(*shape)
    U, S, Vh = torch.linalg.svd(dW.flatten(1), full_matrices=False)
    for rank in (1, 3, 50):
        found = nearest(dW, rank)
        expected = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close((found.B @ found.A).double(), expected, rtol=1e-5, atol=1e-5)
        lost = float((S[rank:] ** 2).sum() / (S**2).sum())
        assert float(found.lost[min(rank, len(S))]) == pytest.approx(lost, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (20, 12)])
def test_with_moments_no_change_of_the_weight_lowers_the_error_of_the_output(shape):
    dW, mixing = random(*shape), random(12, 12, seed=1) * torch.logspace(0, -2, 12, dtype=torch.float64)
    inputs = random(4000, 12, seed=2) @ mixing.T
    C = inputs.T @ inputs
    found = nearest(dW, 3, C)
    best = (found.B @ found.A).double()

    def output_error(D):
        return float((inputs @ (dW - D).T).square().sum() / (inputs @ dW.T).square().sum())

    error = output_error(best)
    assert float(found.lost[3]) == pytest.approx(error, rel=2e-2)  # the damping
    plain = nearest(dW, 3)
    assert error < 0.8 * output_error((plain.B @ plain.A).double())
    for seed in range(3, 20):  # other factors near the best ones
        A, B = found.A + 0.02 * random(*found.A.shape, seed=seed), found.B + 0.02 * random(*found.B.shape, seed=seed)
        assert output_error((B @ A).double()) >= error * (1 - 1e-3)


def test_the_moments_of_a_convolution_are_those_of_its_patches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(2), nn.Linear(9, 2))
    x = torch.randn(5, 3, 6, 6)
    with collected(network, ["0", "2"]) as moments:
        y = network[0](x)
        network(x)
    dW = torch.randn(4, 3, 3, 3)
    change = torch.nn.functional.conv2d(x, dW, None, 2, 1)
    flat = dW.flatten(1)
    assert float(((flat @ moments["0"]) * flat).sum()) == pytest.approx(2 * float(change.square().sum()), rel=1e-4)
    rows = y.flatten(0, 1).flatten(1)
    torch.testing.assert_close(moments["2"], rows.T @ rows)
    assert not network[0]._forward_pre_hooks


def test_groups_keep_the_order_and_the_budget():
    widths = {"a": 10, "b": 10, "c": 20, "d": 100, "e": 1}
    assert groups(widths, 4 * 500) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert groups(widths, 10**9) == [list(widths)]


def test_changes_elsewhere_are_named_and_groups_of_layers_give_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    teacher = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in (network[0].weight, network[1].weight, network[1].bias):
            parameter.add_(torch.randn_like(parameter))
    x, calls = torch.randn(50, 6), []

    def generate():
        calls.append(1)
        network(x)

    together = approximate(network, teacher, 2, generate)
    assert len(calls) == 1
    apart = approximate(network, teacher, 2, generate, memory=1)
    assert len(calls) == 3
    assert together.outside == ["1.bias"]
    assert together.lost == pytest.approx(apart.lost)
    for name in ("0", "1"):
        torch.testing.assert_close(together.loras[name].A, apart.loras[name].A)
    assert together.lost_at(1) > together.lost > together.lost_at(4) > 0
    narrow, wide = approximate(network, teacher, 6, generate).layers  # full ranks 6 and 5
    assert (narrow.rank, wide.rank, sorted(narrow.by_rank), sorted(wide.by_rank)) == (6, 5, [1, 2, 4, 6], [1, 2, 4])
    assert narrow.lost == wide.lost == 0
    with raises_naming("teacher"):
        approximate(network, network.state_dict(), 2, generate)


def test_a_grouped_convolution_is_an_error():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with raises_naming("0", "--to diffusers"):
        approximate(network, {"0.weight": torch.zeros(4, 2, 3, 3), "0.bias": network[0].bias}, 1, lambda: None)
