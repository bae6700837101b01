"""LoRaD on a diffusers network: its adapter interface, and the traps of sharing one backbone between roles."""

import copy

import peft
import pytest
import torch
from lorad_toys import angles, gradients, inputs, randomise

import tiny
from wadi.lorad import LoRaDConfig, LoRaDLayer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def unet(pipeline):
    return copy.deepcopy(pipeline.unet)


def call(unet, **kwargs):
    condition = inputs(2, 5, unet.config.cross_attention_dim)
    return unet(inputs(2, 4, 8, 8), torch.tensor([7, 400]), condition, **kwargs).sample


def with_adapters(unet, *names, **config):
    for k, name in enumerate(names):
        unet.add_adapter(LoRaDConfig(r=3, target_modules=TARGETS, **config), name)
        randomise(unet, 0.3, seed=k)
    for k, name in enumerate(names):
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for p in angles(unet, name).values():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return unet


def layers(unet):
    return [m for m in unet.modules() if isinstance(m, LoRaDLayer)]


def switch(unet, *names):
    """What a role switch does: the active adapters change, ``requires_grad`` does not."""
    for layer in layers(unet):
        layer._active_adapter = list(names)


@torch.no_grad()
def test_adapters_are_added_set_scaled_disabled_and_deleted(unet):
    teacher = call(unet)
    with_adapters(unet, "a", "b")
    outputs = {}
    for name in ("a", "b"):
        unet.set_adapter(name)
        outputs[name] = call(unet)
        assert not torch.allclose(outputs[name], teacher, atol=1e-4)
    unet.disable_adapters()
    assert torch.equal(call(unet), teacher)
    unet.enable_adapters()
    unet.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(call(unet), outputs["a"])
    unet.set_adapters(["a", "b"], [0.5, 0.25])
    both = call(unet)
    unet.set_adapters(["b", "a"], [0.25, 0.5])
    torch.testing.assert_close(call(unet), both)
    unet.delete_adapters("a")
    unet.set_adapters(["b"], [1.0])
    assert torch.equal(call(unet), outputs["b"])


@torch.no_grad()
def test_attention_kwargs_scale_and_exact_restoration(unet):
    teacher = call(unet)
    with_adapters(unet, "a")
    plain = call(unet)
    assert torch.equal(call(unet, cross_attention_kwargs={"scale": 0.0}), teacher)
    assert torch.equal(call(unet), plain)
    half = call(unet, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(call(unet), plain)
    unet.set_adapters(["a"], [0.5])
    assert torch.equal(call(unet), half)


@torch.no_grad()
def test_fusing_and_unfusing(unet):
    with_adapters(unet, "a")
    plain = call(unet)
    unet.set_adapters(["a"], [0.4])
    due = call(unet)
    unet.set_adapters(["a"], [1.0])
    unet.fuse_lora(lora_scale=0.4)
    torch.testing.assert_close(call(unet), due)
    unet.unfuse_lora()
    unet.set_adapters(["a"], [1.0])
    torch.testing.assert_close(call(unet), plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_fused_and_unloaded_network_saves_and_loads_as_a_plain_one(unet, tmp_path):
    with_adapters(unet, "a")
    y = call(unet)
    unet.fuse_lora()
    unet.unload_lora()
    assert not layers(unet)
    unet.save_pretrained(tmp_path)
    assert torch.equal(call(type(unet).from_pretrained(tmp_path)), y)


def test_half_precision_network_gets_float32_angles(unet):
    with_adapters(unet.to(torch.bfloat16), "a")
    assert {p.dtype for p in angles(unet).values()} == {torch.float32}
    unet.to(torch.float16)
    assert {p.dtype for p in angles(unet).values()} == {torch.float32}


def role_gradients(unet, checkpointing=False):
    """Gradients of the student's angles with another role run in between, as in a distillation step."""
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    unet.train()
    for p in angles(unet).values():
        p.requires_grad_(True)
        p.grad = None
    switch(unet, "student")
    loss = call(unet).square().sum()
    with torch.no_grad():
        switch(unet, "fake")
        call(unet)
        switch(unet)
        call(unet)
    switch(unet, "student")  # backward() runs inside the student's context
    loss.backward()
    return gradients(unet, "student"), gradients(unet, "fake")


@pytest.mark.parametrize("recompute", [False, True])
def test_roles_switched_between_forward_and_backward(unet, recompute):
    with_adapters(unet, "student", "fake", recompute=recompute)
    alone = copy.deepcopy(unet).train()
    alone.set_adapter("student")
    call(alone).square().sum().backward()
    due = gradients(alone, "student")
    for checkpointing in (False, True):
        student, fake = role_gradients(unet, checkpointing)
        torch.testing.assert_close(student, due, rtol=1e-4, atol=1e-5)
        assert all(g is None for g in fake)


@torch.no_grad()
def test_the_teacher_among_the_adapters_is_the_untouched_network(unet):
    teacher = call(unet)
    with_adapters(unet, "student", "fake")
    switch(unet)
    assert torch.equal(call(unet), teacher)


@torch.no_grad()
def test_lora_on_top_of_lorad_is_right_and_merges_children_first(unet):
    teacher = call(unet)
    with_adapters(unet, "student")
    student = call(unet)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    stacked = peft.inject_adapter_in_model(lora, copy.deepcopy(unet), "style")
    layer = next(m for m in stacked.modules() if type(m).__name__ == "Linear" and "style" in getattr(m, "lora_A", {}))
    x = inputs(2, 5, layer.in_features)
    A, B, scale = layer.lora_A["style"].weight, layer.lora_B["style"].weight, layer.scaling["style"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * (x @ A.T @ B.T))
    y = call(stacked)
    assert not torch.allclose(y, student, atol=1e-4)
    assert not torch.allclose(y, teacher, atol=1e-4)
    stacked.apply(lambda m: m.merge() if hasattr(m, "merged_adapters") else None)
    torch.testing.assert_close(call(stacked), y, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_pipeline_with_an_adapter_answers_as_the_fused_one(pipeline):
    pipe = copy.deepcopy(pipeline)
    pipe.set_progress_bar_config(disable=True)
    with_adapters(pipe.unet, "a")
    settings = {"num_inference_steps": 2, "output_type": "np"}
    one = pipe("red apple", generator=torch.Generator().manual_seed(0), **settings).images
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    two = pipe("red apple", generator=torch.Generator().manual_seed(0), **settings).images
    assert abs(one - two).max() < 1e-4
