"""Names of the tensors in an adapter file, and the scale of an adapter in a whole model."""

import pytest
import torch
from torch import nn

from wadi import roles
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig
from wadi.lorad.angles import layer_angles
from wadi.lorad.stored import is_factor, layer_factors, set_scale


def adapted():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5))
    roles.attach(model, "style", LoRaDConfig(r=2, target_modules=r"[02]"))
    for parameter in roles.parameters(model, "style").values():
        nn.init.normal_(parameter)
    return model


def test_factors_of_each_layer_are_found_in_an_adapter_file():
    model = adapted()
    factors = layer_factors(roles.state_dict(model, "style") | {"something.else": torch.ones(1)})
    angles = dict(layer_angles(model, "style"))
    assert factors.keys() == angles.keys() == {"0", "2"}
    for layer, (A, B) in factors.items():
        assert torch.equal(A @ B, angles[layer])
    with pytest.raises(WadiError, match=r"model\.0\.lorad_B"):
        layer_factors({"base_model.model.0.lorad_A": torch.ones(4, 2)})


def test_only_names_of_factors_are_factors():
    assert all(is_factor(key) for key in roles.state_dict(adapted(), "style"))
    assert is_factor("down.0.lorad_B.student")  # in the state dict of a network
    assert not any(is_factor(key) for key in ("0.lora_A.weight", "lorad_A", "0.lorad_B0"))


def test_a_scale_multiplies_the_angles_of_one_adapter():
    model, x = adapted(), torch.randn(3, 6)
    roles.attach(model, "other", LoRaDConfig(r=2, target_modules=r"[02]"))
    with torch.no_grad():
        with roles.active(model, None):
            teacher = model(x)
        with roles.active(model, "style"):
            assert not torch.equal(model(x), teacher)
            full = model(x)
            set_scale(model, "other", 0.0)
            assert torch.equal(model(x), full)
            set_scale(model, "style", 0.0)
            assert torch.equal(model(x), teacher)
