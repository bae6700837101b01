"""Moments survive their way through named tensors."""

import pytest
import torch

from wadi.io.moments import moments_of, restore_moments


def stepped(kind, seed=0):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = kind(parameters, lr=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_come_back_bit_for_bit(kind):
    optimizer, other = stepped(kind), stepped(kind, seed=1)
    tensors = moments_of(optimizer, "adam.")
    assert {"adam.0.exp_avg", "adam.0.exp_avg_sq", "adam.0.step", "adam.1.exp_avg"} <= tensors.keys()
    restore_moments(other, {**tensors, "net.weight": torch.zeros(1), "adamant": torch.zeros(1)}, "adam.")
    restored = moments_of(other, "adam.")
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)


def test_groups_of_tables_and_whole_numbers_come_back():
    """As bitsandbytes stores them: a dictionary of shared tables, and the step as an int."""
    optimizer = stepped(torch.optim.SGD)
    table = torch.arange(4.0)
    state = optimizer.state_dict()
    state["state"] = {i: {"state1": torch.ones(2), "step": 3, "tables": {"q": table}} for i in range(2)}
    optimizer.load_state_dict(state)
    tensors = moments_of(optimizer, "student.")
    assert tensors["student.1.tables/q"].data_ptr() != tensors["student.0.tables/q"].data_ptr()
    other = stepped(torch.optim.SGD, seed=1)
    restore_moments(other, tensors, "student.")
    moments = other.state_dict()["state"][1]
    assert (moments["step"], type(moments["step"])) == (3, int)
    assert torch.equal(moments["tables"]["q"], table)


@pytest.mark.parametrize("name", ["adam.exp_avg", "adam.0.1.exp_avg", "adam.first.exp_avg"])
def test_another_form_of_name(name):
    with pytest.raises(ValueError):
        restore_moments(stepped(torch.optim.Adam), {name: torch.zeros(())}, "adam.")


def test_a_file_with_names_of_its_own():
    optimizer, other = stepped(torch.optim.Adam), stepped(torch.optim.Adam, seed=1)
    names = {"exp_avg": "m", "exp_avg_sq": "v"}
    tensors = moments_of(optimizer, "", names)
    assert tensors.keys() == {"0.m", "0.v", "1.m", "1.v"}
    tensors |= {f"{i}.{name}": torch.tensor(7.0) for i in range(2) for name in ("step", "row")}
    restore_moments(other, tensors, "", {**names, "step": "step"})
    assert other.state_dict()["state"][1]["step"] == 7
    assert torch.equal(moments_of(other, "", names)["1.v"], tensors["1.v"])
