"""Whole weights as a PEFT method: its arithmetic, its life in PEFT and diffusers, its files."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.testing import assert_close

import tiny
from raising import raises_naming
from wadi.full import FullConfig, FullLayer

KINDS = {
    "linear": lambda: nn.Linear(9, 4),
    "without bias": lambda: nn.Linear(9, 4, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", groups=2),
}


def layer_of(kind, seed=0):
    """A layer with an adapter that has a difference, the plain layer, and an input."""
    torch.manual_seed(seed)
    plain = KINDS[kind]()
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(plain)), FullConfig(target_modules=["0"]))
    x = torch.randn(2, 4, 6, 6) if kind == "conv" else torch.randn(3, 9)
    return model, plain, x


def delta_of(model, name="default"):
    return next(m for m in model.modules() if isinstance(m, FullLayer)).full_delta[name]


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_is_the_layer_with_another_weight(kind):
    model, plain, x = layer_of(kind)
    assert torch.equal(model(x), plain(x))
    dW = torch.randn_like(plain.weight)
    with torch.no_grad():
        delta_of(model).copy_(dW)
        plain.weight.add_(dW)
    assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(delta_of(model).grad, plain.weight.grad)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["base_model.model.0.full_delta.default"]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_scaling_and_several_adapters_add_up(kind):
    model, plain, x = layer_of(kind)
    model.add_adapter("other", FullConfig(target_modules=["0"]))
    with torch.no_grad():
        delta_of(model).normal_()
        delta_of(model, "other").normal_()
    both, scaled = copy.deepcopy(plain), copy.deepcopy(plain)
    with torch.no_grad():
        both.weight.add_(delta_of(model) + delta_of(model, "other"))
        scaled.weight.add_(0.5 * delta_of(model))
    model.base_model.set_adapter(["default", "other"])
    assert_close(model(x), both(x))
    model.merge_adapter()
    assert_close(model(x), both(x))
    model.unmerge_adapter()
    assert_close(model.base_model.model[0].get_base_layer().weight, plain.weight)
    model.set_adapter("default")
    (layer,) = (m for m in model.modules() if isinstance(m, FullLayer))
    layer.set_scale("default", 0.5)
    assert_close(model(x), scaled(x))
    layer.set_scale("default", 0)
    assert_close(model(x), plain(x))  # to the rounding of unmerging
    with model.disable_adapter():
        assert_close(model(x), plain(x))


def test_with_an_adapter_of_another_method_both_count():
    _, plain, x = layer_of("linear")
    outer = peft.get_peft_model(nn.Sequential(copy.deepcopy(plain)), LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for name, p in outer.named_parameters():
            if "lora" in name:
                p.normal_()
    alone = outer(x)
    peft.inject_adapter_in_model(FullConfig(target_modules=["0"]), outer.base_model.model, "full")
    assert torch.equal(outer(x), alone)
    with torch.no_grad():
        delta_of(outer, "full").normal_()
    assert_close(outer(x), alone + x @ delta_of(outer, "full").T)


def test_the_difference_is_float32_on_a_half_precision_network():
    model, plain, x = layer_of("linear")
    model.to(torch.bfloat16)
    assert delta_of(model).dtype == torch.float32
    with torch.no_grad():
        delta_of(model).fill_(1e-5)  # bfloat16 has no such difference to most weights
    expected = (plain.weight.bfloat16().float() + 1e-5).bfloat16()
    assert_close(model(x.bfloat16()), nn.functional.linear(x.bfloat16(), expected, plain.bias.bfloat16()))
    assert model(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("low_memory", [False, True])
def test_peft_saves_and_loads_it(tmp_path, low_memory):
    model, plain, x = layer_of("conv")
    with torch.no_grad():
        delta_of(model).normal_()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(plain)), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(again(x), model(x))
    assert_close(model.merge_and_unload()(x), again(x))


def test_diffusers_adds_scales_fuses_and_removes_it(tmp_path):
    unet = tiny.stable_diffusion(tmp_path).unet
    names, x, words = set(unet.state_dict()), torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    call = lambda **k: unet(x, torch.tensor([7]), words, **k).sample.detach()  # noqa: E731
    plain = call()
    unet.add_adapter(FullConfig(target_modules=["to_q", "conv1"], init_weights=False), "a")
    changed = call()
    assert (changed - plain).abs().max() > 1e-3
    assert_close(call(cross_attention_kwargs={"scale": 0}), plain)
    unet.set_adapters("a", 0.0)
    assert torch.equal(call(), plain)
    unet.set_adapters("a", 1.0)
    unet.fuse_lora()
    assert_close(call(), changed, atol=1e-5, rtol=1e-4)
    unet.unload_lora()
    assert set(unet.state_dict()) == names


def test_only_plain_layers_can_be_trained():
    with raises_naming("0", "Embedding"):
        peft.get_peft_model(nn.Sequential(nn.Embedding(3, 4)), FullConfig(target_modules=["0"]))
