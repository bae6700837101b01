"""Laws of the layers: what they compute, in which precision, and what merging and scales mean."""

import copy

import pytest
import torch
from lorad_toys import Toy, adapted, angles, gradients, inputs, randomise, rotated_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from raising import raises_naming
from wadi import WadiError
from wadi.lorad import LoRaDConfig, pair_angles, rotate

BOTH = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_angles_zero_is_the_base_model_bit_for_bit(dtype, recompute):
    base = Toy().to(dtype)
    model = adapted(copy.deepcopy(base), random=False, recompute=recompute)
    x = inputs().to(dtype)
    assert torch.equal(model(x), base(x))


@BOTH
@HALVES
def test_angles_zero_is_the_base_model_bit_for_bit_under_autocast(half, recompute):
    base = Toy()
    model = adapted(copy.deepcopy(base), random=False, recompute=recompute)
    with torch.autocast("cpu", dtype=half):
        assert torch.equal(model(inputs()), base(inputs()))
        assert model(inputs()).dtype == half


@BOTH
def test_no_active_adapter_disabled_and_scale_zero_are_the_base_model_bit_for_bit(recompute):
    base = Toy()
    model = adapted(copy.deepcopy(base), recompute=recompute)
    layers = [m for m in model.modules() if hasattr(m, "lorad_A")]
    expected = base(inputs())
    assert not torch.allclose(model(inputs()), expected)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), expected)
    for layer in layers:
        layer.set_scale("default", 0)
    assert torch.equal(model(inputs()), expected)
    for layer in layers:
        layer.set_scale("default", 1)
        layer._active_adapter = []
    assert torch.equal(model(inputs()), expected)


@BOTH
@pytest.mark.parametrize("layer", ["lin", "conv", "head"])
def test_output_is_the_base_layer_with_the_rotated_weight(layer, recompute):
    model = adapted(recompute=recompute)
    rotated = getattr(model.base_model.model, layer)
    plain = copy.deepcopy(rotated.get_base_layer())
    theta = rotated.lorad_A["default"] @ rotated.lorad_B["default"]
    plain.weight.data = rotate(plain.weight, theta).detach()
    x = inputs(2, 4, 5, 6) if layer == "conv" else inputs(2, 3, plain.in_features)
    torch.testing.assert_close(rotated(x), plain(x))


@pytest.mark.parametrize("kwargs", [
    {"padding": "same", "dilation": 2}, {"padding_mode": "circular", "padding": 1}, {"padding": "valid"},
    {"stride": (2, 1), "padding": (0, 2), "groups": 2, "bias": False}, {"padding_mode": "reflect", "padding": "same"},
])  # fmt: skip
@BOTH
def test_every_kind_of_convolution(kwargs, recompute):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **kwargs)
    model = adapted(nn.Sequential(conv), target_modules=["0"], recompute=recompute, random=False)
    x = inputs(2, 4, 7, 7)
    assert torch.equal(model(x), conv(x))
    assert torch.equal(model(x[0]), conv(x[0]))
    randomise(model)
    model(x).square().sum().backward()
    wide = copy.deepcopy(model).double()
    for p in angles(wide).values():
        p.grad = None
    wide(x.double()).square().sum().backward()
    for a, b in zip(gradients(model), gradients(wide), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3)


def test_gradients_do_not_depend_on_what_is_kept():
    x = inputs().requires_grad_()
    grads = []
    for recompute in (False, True):
        model = adapted(recompute=recompute, bias="lorad_only")
        out = torch.autograd.grad(model(x).square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
        grads.append(out)
    assert len(grads[0]) == 1 + 6 + 3
    torch.testing.assert_close(grads[0], grads[1])


@BOTH
@HALVES
def test_angles_stay_float32_whatever_happens_to_the_model(half, recompute):
    model = adapted(Toy().to(half), recompute=recompute)
    before = {name: p.detach().clone() for name, p in angles(model).items()}
    for cast in (lambda: model.to(half), lambda: model.half(), lambda: model.bfloat16()):
        cast()
        assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in angles(model).items())
    model.to(half)(inputs().to(half)).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in angles(model).values())


@HALVES
def test_small_angles_survive_a_half_precision_model(half):
    """A change of angles too small for half precision still changes the rotated weight correctly."""
    layer = rotated_layer(64, 64).to(half)
    W = layer.get_base_layer().weight
    with torch.no_grad():
        layer.lorad_A["default"].mul_(1e-3)
    theta = layer.lorad_A["default"].double() @ layer.lorad_B["default"].double()
    due = rotate(W.double(), theta)
    with torch.autocast("cpu", dtype=half):
        computed = pair_angles(layer._factors(["default"]))
    assert ((computed - theta).norm() / theta.norm()) < 1e-6
    x = torch.eye(64, dtype=half)
    got = layer(x).T - layer.bias[:, None]
    assert (got.double() - due).abs().max() <= 4 * torch.finfo(half).eps * due.abs().max()


@BOTH
def test_autocast_and_full_precision_agree_and_gradients_are_float32(recompute):
    model = adapted(recompute=recompute)
    model(inputs()).sum().backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(inputs())
        y.sum().backward()  # inside autocast, where its products would run in half precision
    assert y.dtype == torch.bfloat16
    for got, due in zip(gradients(model), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - due).norm() <= 0.05 * due.norm()


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, recompute):
    model = adapted(recompute=recompute)
    model(inputs()).square().sum().backward()
    plain = gradients(model)
    model.zero_grad()
    checkpoint(model, inputs().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(gradients(model), plain)


@BOTH
def test_an_adapter_used_twice_in_a_step_gets_both_gradients(recompute):
    model = adapted(recompute=recompute)
    parts = []
    for x in (inputs(seed=3), inputs(seed=4)):
        model.zero_grad()
        model(x).square().sum().backward()
        parts.append(gradients(model))
    model.zero_grad()
    (model(inputs(seed=3)).square().sum() + model(inputs(seed=4)).square().sum()).backward()
    torch.testing.assert_close(gradients(model), [a + b for a, b in zip(*parts, strict=True)])


@BOTH
def test_frozen_angles_still_pass_the_gradient_of_their_input(recompute):
    model = adapted(recompute=recompute)
    x = inputs().requires_grad_()
    (due,) = torch.autograd.grad(model(x).square().sum(), x)
    model.requires_grad_(False)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, due)
    assert not model(inputs()).requires_grad


@BOTH
def test_a_trained_base_weight_gets_its_gradient(recompute):
    layer = rotated_layer(recompute=recompute)
    W = layer.get_base_layer().weight.requires_grad_()
    x = inputs(4, 10)
    layer(x).square().sum().backward()
    theta = (layer.lorad_A["default"] @ layer.lorad_B["default"]).detach()
    due = torch.autograd.grad((x @ rotate(W, theta).T + layer.bias).square().sum(), W)[0]
    torch.testing.assert_close(W.grad, due)


def test_changing_angles_between_forward_and_backward_is_an_error_not_a_wrong_gradient():
    for recompute in (False, True):
        layer = rotated_layer(recompute=recompute)
        y = layer(inputs(4, 10)).sum()
        with torch.no_grad():
            layer.lorad_A["default"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_active_adapters_and_scales_add_as_angles():
    model = adapted()
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin", "conv", "head"]))
    randomise(model, seed=5)
    layer = model.base_model.model.lin
    layer.set_adapter(["default", "b"])
    layer.set_scale("b", -0.5)
    A, B = layer.lorad_A, layer.lorad_B
    theta = A["default"] @ B["default"] - 0.5 * A["b"] @ B["b"]
    x = inputs()
    due = x @ rotate(layer.get_base_layer().weight, theta).T + layer.bias
    torch.testing.assert_close(layer(x), due)
    layer._active_adapter = ["b", "default"]
    torch.testing.assert_close(layer(x), due)


def test_scaling_and_unscaling():
    layer, x = rotated_layer(), inputs(3, 10)
    plain = layer(x)
    layer.set_scale("default", 0.5)
    half = layer(x)
    layer.scale_layer(2.0)
    assert torch.equal(layer(x), plain)
    layer.unscale_layer(2.0)
    assert torch.equal(layer(x), half)
    layer.unscale_layer()
    assert torch.equal(layer(x), plain)
    with pytest.raises(WadiError, match="set_scale"):
        layer.unscale_layer(0)
    layer.set_scale("unknown", 3.0)
    assert layer.scaling == {"default": 1.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_is_the_forward_and_unmerge_restores(dtype, safe):
    model = adapted(Toy().to(dtype))
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin", "conv"]))
    randomise(model, seed=5)
    model.base_model.set_adapter(["default", "b"])
    layers = [m for m in model.modules() if hasattr(m, "lorad_A")]
    layers[0].set_scale("b", 0.25)
    x, before = inputs().to(dtype), [layer.get_base_weight().clone() for layer in layers]
    y = model(x)
    model.merge_adapter(safe_merge=safe)
    assert torch.equal(model(x), y)
    layers[0].set_scale("b", 7.0)  # unmerging undoes what was merged, not what the scale is now
    model.unmerge_adapter()
    for layer, W in zip(layers, before, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * W.abs().max().item()
        torch.testing.assert_close(layer.get_base_weight(), W, rtol=0, atol=rounding)


def test_a_merged_adapter_that_is_switched_off_leaves_the_base_model():
    base = Toy()
    x = inputs()
    expected = base(x)
    model = adapted(base)
    model.merge_adapter()
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters")
def test_merging_one_adapter_after_the_other_is_merging_both():
    model = adapted()
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin", "conv", "head"]))
    randomise(model, seed=5)
    model.base_model.set_adapter(["default", "b"])
    y = model(inputs())
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(inputs()), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(inputs()), y)


def test_safe_merge_of_broken_angles_is_an_error_and_leaves_the_weight():
    layer = rotated_layer()
    W = layer.get_base_weight().clone()
    layer.lorad_A["default"].data[0, 0] = float("nan")
    with raises_naming("default"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), W)
    assert not layer.merged


def test_merge_and_unload_leaves_a_plain_model():
    model = adapted()
    y = model(inputs())
    plain = model.merge_and_unload()
    assert {type(m) for m in plain.modules()} == {Toy, nn.Linear, nn.Conv2d}
    assert torch.equal(plain(inputs()), y)


def test_delta_weight_is_what_the_rotation_adds():
    layer, x = rotated_layer(bias=False), inputs(3, 10)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)
