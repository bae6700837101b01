"""Laws of pairings: another choice of partners is the same rotation of other columns."""

import copy

import peft
import pytest
import torch
from torch import nn

from raising import raises_naming
from wadi.lorad import LoRaDConfig
from wadi.lorad.pairing import NEIGHBOURS, PAIRINGS, column_order, stored_pairing, with_partners_together
from wadi.lorad.rotation import rotate


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 7))


def adapted(pairing, base=None, name="default"):
    config = LoRaDConfig(r=2, target_modules=["0", "2"], init_weights=False, pairing=pairing)
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(base or network()), config, adapter_name=name)


def test_halves_rotate_column_j_with_column_j_plus_half():
    W, theta = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    R = with_partners_together(lambda W: rotate(W, theta), W, "halves")
    for j in range(3):
        a, b, cos, sin = W[:, j], W[:, j + 3], theta[:, j].cos(), theta[:, j].sin()
        torch.testing.assert_close(R[:, j], a * cos - b * sin)
        torch.testing.assert_close(R[:, j + 3], a * sin + b * cos)
    assert torch.equal(R[:, 6], W[:, 6])


@pytest.mark.parametrize("pairing", PAIRINGS[1:])
@pytest.mark.parametrize("fan_in", [2, 7, 64])
def test_an_order_has_every_column_once(pairing, fan_in):
    order, inverse = column_order(pairing, fan_in)
    assert sorted(order.tolist()) == list(range(fan_in))
    assert torch.equal(order[inverse], torch.arange(fan_in))


def test_random_pairs_are_always_the_same():
    assert column_order("random", 6)[0].tolist() == torch.randperm(6, generator=torch.Generator().manual_seed(6)).tolist()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_merge_equals_forward_and_keeps_norms(pairing):
    base, x = network(), torch.randn(2, 3, 6, 6)
    model = adapted(pairing, base)
    before = model(x)
    assert not torch.allclose(before, base(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before)
    for index in (0, 2):
        torch.testing.assert_close(merged[index].weight.flatten(1).norm(dim=1), base[index].weight.flatten(1).norm(dim=1))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_unmerge_restores_the_weight(pairing):
    model, base = adapted(pairing), network()
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model[2].base_layer.weight, base[2].weight)


def test_pairings_differ():
    x = torch.randn(2, 3, 6, 6)
    outputs = [adapted(pairing)(x) for pairing in PAIRINGS]
    assert not any(torch.allclose(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_gradient_is_that_of_plain_autograd(pairing):
    model, x = adapted(pairing), torch.randn(2, 3, 6, 6)
    model(x).square().sum().backward()
    layer = model.base_model.model[2]
    A, B = (getattr(layer, f"lorad_{end}")["default"] for end in "AB")
    a, b = (tensor.detach().clone().requires_grad_() for tensor in (A, B))
    inner = model.base_model.model[1](model.base_model.model[0](x)).detach()
    R = with_partners_together(lambda W: rotate(W, a @ b), layer.base_layer.weight.detach(), pairing)
    (inner @ R.T + layer.base_layer.bias).square().sum().backward()
    torch.testing.assert_close(A.grad, a.grad)
    torch.testing.assert_close(B.grad, b.grad)


def test_a_saved_adapter_keeps_its_pairing(tmp_path):
    model, x = adapted("halves"), torch.randn(2, 3, 6, 6)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(network(), tmp_path)(x), model(x))


def test_adapters_of_different_pairings_are_not_active_together():
    model = adapted("halves")
    model.add_adapter("other", LoRaDConfig(r=2, target_modules=["0", "2"], init_weights=False))
    x = torch.randn(2, 3, 6, 6)
    model.set_adapter("other")
    torch.testing.assert_close(model(x).shape, torch.Size([2, 7]))  # each of them alone is fine
    model.base_model.set_adapter(["default", "other"])
    with raises_naming("halves", NEIGHBOURS):
        model(x)
    with raises_naming("pairing"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")


def test_what_cannot_be_is_refused():
    with raises_naming("pairing", "diagonal"):
        LoRaDConfig(pairing="diagonal")
    with raises_naming("halves", "recompute"):
        LoRaDConfig(pairing="halves", recompute=True)
    with raises_naming("adapter", "diagonal"):
        stored_pairing({"pairing": "diagonal"}, "adapter")
    assert stored_pairing({}, "adapter") == NEIGHBOURS
