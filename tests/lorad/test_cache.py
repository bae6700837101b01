"""Rotated weights reused across forwards without gradient: exact, never stale, given back."""

from unittest.mock import patch

import pytest
import torch
from lorad_toys import adapted, angles, inputs, randomise

from wadi.lorad import LoRaDConfig, cached_rotation, layer


@pytest.fixture
def built(monkeypatch):
    """Counts how often a weight is rotated for a forward."""
    with patch.object(layer, "rotated_weight", wraps=layer.rotated_weight) as counted:
        yield lambda: counted.call_count


@torch.no_grad()
def test_each_layer_rotates_once_and_the_result_is_the_same_to_the_bit(built):
    model, x = adapted(), inputs()
    y = model(x)
    assert built() == 3
    with cached_rotation(model):
        for _ in range(4):
            assert torch.equal(model(x), y)
        assert built() == 6
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(x)
        assert built() == 9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x), low)
    assert built() == 12


@pytest.mark.parametrize("optimiser", [
    lambda p: torch.optim.SGD(p, 0.1, foreach=False), lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    lambda p: torch.optim.AdamW(p, 0.1, fused=True),
], ids=["loop", "foreach", "fused"])  # fmt: skip
def test_an_optimiser_step_inside_is_seen(optimiser):
    model, x = adapted(), inputs()
    step = optimiser(list(angles(model).values()))
    with cached_rotation(model):
        with torch.no_grad():
            before = model(x)
        for _ in range(2):
            model(x).square().sum().backward()
            step.step()
            with torch.no_grad():
                inside = model(x)
            assert not torch.equal(inside, before)
            before = inside
    with torch.no_grad():
        torch.testing.assert_close(model(x), inside)


@torch.no_grad()
def test_scales_adapters_casts_and_merges_inside_are_seen():
    model, x = adapted(), inputs()
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin"], init_weights=False))
    target = model.base_model.model.lin

    def rescale():
        target.set_scale("default", 0.3)

    def merge():
        model.merge_adapter()
        model.unmerge_adapter()

    def move_base():
        target.base_layer.weight.add_(1)

    changes = [rescale, lambda: model.set_adapter("b"), lambda: model.double(), merge, move_base, model.half]
    changes += [lambda: model.load_state_dict(other), lambda: model.set_adapter("default")]
    other = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    with cached_rotation(model):
        for change in changes:
            model(x)
            change()
            x = x.to(target.base_layer.weight.dtype)
            inside = model(x)
            with patch.object(layer, "reusable", return_value=False):
                torch.testing.assert_close(inside, model(x))  # products round by where their operands lie


def test_forwards_that_train_are_not_cached(built):
    model, x = adapted(), inputs()
    with cached_rotation(model):
        for _ in range(2):
            model(x).sum().backward()
        assert built() == 6
        with torch.inference_mode():
            model(x)
        model.requires_grad_(False)
        z = inputs().requires_grad_()
        model(z).sum().backward()  # a weight built in inference mode could not be saved for this
        assert z.grad is not None


def test_memory_is_given_back_also_after_an_error_and_when_nested():
    model = adapted()
    layers = [m for m in model.modules() if hasattr(m, "rotation_cache")]
    assert len(layers) == 3

    def fail_inside():
        with cached_rotation(model):
            with cached_rotation(model):
                pass
            assert all(m.rotation_cache is not None for m in layers)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(m.rotation_cache is None for m in layers)


def test_angles_written_in_place_inside_are_seen():
    model, x = adapted(), inputs()
    with cached_rotation(model), torch.no_grad():
        model(x)
        randomise(model, seed=9)
        inside = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), inside)
