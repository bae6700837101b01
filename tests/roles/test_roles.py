"""One frozen network, three roles: what switching, saving and fusing adapters must and must not change."""

import json
import re
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import tiny
from wadi import roles
from wadi.errors import WadiError
from wadi.io import patterns
from wadi.lorad import LoRaDConfig
from wadi.lorad.angles import layer_angles

STUDENT = r"(down_blocks|mid_block|up_blocks)\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|time_emb_proj)"
FAKE = r".*attn\d\.(to_q|to_k|to_v)"


def network(dtype=torch.float32, **unet):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    plain = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**{**plain, **unet}).to(dtype).eval()


def turn(model, name, size=0.3, seed=1):
    """Give an adapter angles that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in roles.parameters(model, name).items():
            if key.endswith("lorad_A"):
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def both(dtype=torch.float32, size=0.3):
    model = network(dtype)
    roles.attach(model, "student", LoRaDConfig(r=4, target_modules=STUDENT))
    roles.attach(model, "fake", LoRaDConfig(r=2, target_modules=FAKE))
    return turn(turn(model, "student", size, 1), "fake", size, 2) if size else model


def call(model, seed=3, batch=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator).to(model.dtype)
    words = torch.randn(batch, 5, 16, generator=generator).to(model.dtype)
    return model(x, torch.tensor([500] * batch), words).sample


@torch.no_grad()
def speak(model, role, **options):
    with roles.active(model, role):
        return call(model, **options)


def requires_grad(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


# --- three roles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_zero_angles_all_roles_are_the_plain_network_bit_for_bit(dtype):
    plain = call(network(dtype)).detach()
    model = both(dtype, size=0)
    for role in ("student", "fake", None):
        assert torch.equal(speak(model, role), plain)


def test_roles_are_apart():
    model = both()
    plain, alone = call(network()).detach(), network()
    roles.attach(alone, "student", LoRaDConfig(r=4, target_modules=STUDENT))
    roles.restore(alone, "student", roles.state_dict(model, "student"))
    student, fake, teacher = (speak(model, role) for role in ("student", "fake", None))
    assert torch.equal(teacher, plain)
    assert torch.equal(student, speak(alone, "student"))  # a second adapter on the same layers does not enter
    assert not torch.allclose(student, plain, atol=1e-3)
    assert not torch.allclose(fake, plain, atol=1e-3)
    assert not torch.allclose(student, fake, atol=1e-3)


def test_the_teacher_is_frozen_and_all_angles_train():
    model = both()
    angles = {key for key, parameter in model.named_parameters() if "lorad_" in key}
    assert {key for key, wants in requires_grad(model).items() if wants} == angles
    held = [roles.parameters(model, role) for role in ("student", "fake")]
    assert sum(len(found) for found in held) == len(angles)
    assert not {id(p) for p in held[0].values()} & {id(p) for p in held[1].values()}


def test_switching_changes_nothing_but_the_active_adapter():
    model = both()
    for parameter in roles.parameters(model, "fake").values():
        parameter.requires_grad_(False)  # whatever the state is, it stays
    before, weights = requires_grad(model), {key: value.clone() for key, value in model.state_dict().items()}
    with roles.active(model, "student"):
        first = call(model)
        with roles.active(model, None):
            call(model)
            assert requires_grad(model) == before
            with roles.active(model, "fake"):
                call(model)
                assert requires_grad(model) == before
        assert torch.equal(call(model), first)  # nested blocks give back what was active
    assert requires_grad(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_an_exception_gives_back_the_role():
    model = both()
    student = speak(model, "student")
    with torch.no_grad(), roles.active(model, "student"):
        with pytest.raises(RuntimeError), roles.active(model, "fake"):
            raise RuntimeError
        assert torch.equal(call(model), student)


def test_a_role_that_nobody_plays_is_refused():
    """Switching to a misspelt role would speak as the teacher without a word."""
    model = both()
    with pytest.raises(WadiError, match="studnet"), roles.active(model, "studnet"):
        pass
    with pytest.raises(WadiError, match="student"), roles.active(network(), "student"):
        pass


# --- gradients ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_in", ["student", "fake", "outside"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_students_gradient_does_not_depend_on_the_role_at_backward(checkpointing, recompute, backward_in):
    alone, model = network(), network()
    for one in (alone, model):
        roles.attach(one, "student", LoRaDConfig(r=4, target_modules=STUDENT, recompute=recompute))
        turn(one, "student")
    roles.restore(model, "student", roles.state_dict(alone, "student"))  # B as well
    roles.attach(model, "fake", LoRaDConfig(r=2, target_modules=FAKE, recompute=recompute))
    turn(model, "fake", seed=2)

    call(alone).square().sum().backward()
    if checkpointing:
        roles.enable_checkpointing(model)
    with roles.active(model, "student"):
        loss = call(model).square().sum()
    with torch.no_grad():
        speak(model, "fake")
        speak(model, None)
    with nullcontext() if backward_in == "outside" else roles.active(model, backward_in):
        loss.backward()
    expected, got = roles.parameters(alone, "student"), roles.parameters(model, "student")
    assert expected.keys() == got.keys()
    for key, parameter in got.items():
        assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad.abs().max() > 0
    others = [
        parameter.grad
        for key, parameter in model.named_parameters()
        if "lorad_A.student" not in key and "lorad_B.student" not in key
    ]
    assert all(gradient is None for gradient in others)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_flows_through_two_roles(checkpointing):
    """``fake(student(x))``: checkpointing must recompute the first call as the student and the second as the fake model."""

    def gradients(on):
        model = both()
        if on:
            roles.enable_checkpointing(model)
        generator = torch.Generator().manual_seed(3)
        x, words = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
        for role in ("student", "fake"):
            with roles.active(model, role):
                x = model(x, torch.tensor([500, 500]), words).sample
        x.square().sum().backward()
        return {f"{role} {key}": p.grad for role in ("student", "fake") for key, p in roles.parameters(model, role).items()}

    expected, found = gradients(False), gradients(checkpointing)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(value.abs().max() > 0 for value in expected.values())


def test_a_network_without_checkpointing_is_named():
    class Plain(nn.Module):
        is_gradient_checkpointing = False

        def enable_gradient_checkpointing(self, function):
            pass

    with pytest.raises(WadiError, match="Plain"):
        roles.enable_checkpointing(Plain())


# --- memory and precision -----------------------------------------------------------------------------------------------------


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_parameter_memory_is_one_network_and_the_angles(tmp_path, sd_folder, prompts_path):
    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.distill.optimizers import initial_state
    from wadi.distill.setup import attach_roles

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run")
    backbone = from_pipeline(load_pipeline(sd_folder))
    plain = sum(storages(backbone.network.parameters()).values())
    attach_roles(backbone, config)
    state = initial_state(backbone.network, config, torch.device("cpu"))
    layers = {
        role: [layer for key, layer in backbone.network.named_modules() if role in getattr(layer, "lorad_A", {})]
        for role in ("student", "fake")
    }
    ranks = {"student": config.student.rank, "fake": config.fake.rank}
    angles = sum(
        4 * ranks[role] * (layer.out_features + layer.in_features // 2) for role, found in layers.items() for layer in found
    )
    held = [*backbone.network.parameters(), *backbone.network.buffers()]
    for optimizer in state.optimizers.values():
        held += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sum(storages(held).values()) == plain + angles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_float32_on_a_half_precision_network(dtype):
    model = both(dtype)
    model.to(dtype)  # a later cast does not round them either
    angles = [*roles.parameters(model, "student").values(), *roles.parameters(model, "fake").values()]
    assert {parameter.dtype for parameter in angles} == {torch.float32}
    assert {p.dtype for key, p in model.named_parameters() if "lorad_" not in key} == {dtype}
    assert {theta.dtype for _, theta in layer_angles(model, "student")} == {torch.float32}


# --- on disk ------------------------------------------------------------------------------------------------------------------


def test_save_and_load_are_inverse_bit_for_bit(tmp_path):
    model = both()
    roles.save(model, "student", tmp_path / "student", extra={"timestep": 7})
    fresh = network()
    roles.load(fresh, tmp_path / "student", "again")
    saved, found = roles.state_dict(model, "student"), roles.state_dict(fresh, "again")
    assert saved.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in saved.items())
    assert torch.equal(speak(fresh, "again"), speak(model, "student"))
    assert json.loads((tmp_path / "student" / "wadi.json").read_text()) == {"timestep": 7}


def test_other_tensors_can_be_saved_in_place_of_the_live_ones(tmp_path):
    model = both()
    average = {key: value / 2 for key, value in roles.state_dict(model, "student").items()}
    roles.save(model, "student", tmp_path / "student", average)
    _, found = roles.read(tmp_path / "student")
    assert all(torch.equal(value, average[key]) for key, value in found.items())


def test_peft_reads_the_folder(tmp_path):
    from peft import PeftModel

    model = both()
    roles.save(model, "student", tmp_path / "student")
    wrapped = PeftModel.from_pretrained(network(), str(tmp_path / "student"))
    with torch.no_grad():
        x = call(wrapped.base_model.model)
    assert torch.equal(x, speak(model, "student"))


def test_an_adapter_of_another_architecture_names_the_layers(tmp_path):
    deep = network(layers_per_block=2)
    roles.attach(deep, "student", LoRaDConfig(r=4, target_modules=STUDENT))
    roles.save(deep, "student", tmp_path / "deep")
    wide = network(cross_attention_dim=20)
    roles.attach(wide, "student", LoRaDConfig(r=4, target_modules=STUDENT))
    roles.save(wide, "student", tmp_path / "wide")
    shallow = both(size=0)
    roles.save(shallow, "student", tmp_path / "shallow")
    with pytest.raises(WadiError, match=r"'[a-z_]+blocks\.[\w.]+'"):
        roles.load(network(), tmp_path / "deep", "student")
    with pytest.raises(WadiError, match=r"attn2\.to_k\.lorad_B"):
        roles.load(network(), tmp_path / "wide", "student")
    with pytest.raises(WadiError, match=r"[a-z_]+blocks\.[\w.]+"):
        roles.load(network(layers_per_block=2), tmp_path / "shallow", "student")


def test_an_adapter_of_another_rank_does_not_fit():
    model, other = both(), network()
    roles.attach(other, "student", LoRaDConfig(r=3, target_modules=STUDENT))
    before = {key: value.clone() for key, value in roles.state_dict(model, "student").items()}
    with pytest.raises(WadiError, match=r"\.lorad_[AB]"):
        roles.restore(model, "student", roles.state_dict(other, "student"))
    assert all(torch.equal(value, before[key]) for key, value in roles.state_dict(model, "student").items())


def damage(folder, what):
    weights, config = folder / roles.WEIGHTS, folder / roles.CONFIG
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no safetensors":
        weights.write_bytes(b"\x80\x04 a pickle")
    elif what == "no json":
        config.write_text("{")
    elif what == "binary":
        config.write_bytes(b"\xff\xfe")
    elif what == "a list":
        config.write_text("[]")
    elif what == "other type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "LORA"}))
    elif what == "rank 0":
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 0}))
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()


@pytest.mark.parametrize(
    "what", ["truncated", "no safetensors", "no json", "binary", "a list", "other type", "rank 0", "no weights", "no config"]
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, what):
    model = nn.Sequential(nn.Linear(6, 5))
    roles.attach(model, "student", LoRaDConfig(r=2, target_modules="0"))
    roles.save(model, "student", tmp_path / "student")
    damage(tmp_path / "student", what)
    with pytest.raises(WadiError, match="excess_rank" if what == "other type" else "r is 0" if what == "rank 0" else "student"):
        roles.load(nn.Sequential(nn.Linear(6, 5)), tmp_path / "student", "student")


# --- fusing -------------------------------------------------------------------------------------------------------------------


def test_a_fused_network_is_plain_and_speaks_as_the_student(tmp_path):
    from diffusers import UNet2DConditionModel

    plain, model = network(), both()
    student = speak(model, "student")
    fused = roles.fuse(model, "student")
    assert fused is model
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        assert_close(call(fused), student, rtol=1e-4, atol=1e-5)
    changed = {key for key, value in fused.state_dict().items() if not torch.equal(value, plain.state_dict()[key])}
    assert changed
    for key in changed:  # a rotation keeps the length of every row
        assert_close(fused.state_dict()[key].norm(dim=1), plain.state_dict()[key].norm(dim=1))
    fused.save_pretrained(tmp_path / "unet")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        assert torch.equal(call(again), call(fused))
    roles.refuse_adapted(fused)


def test_fusing_what_is_not_there():
    with pytest.raises(WadiError) as error:
        roles.fuse(both(), "ghost")
    assert all(name in str(error.value) for name in ("'ghost'", "'student'", "'fake'"))


# --- attaching ----------------------------------------------------------------------------------------------------------------


def test_attach_tells_the_layers():
    model = network()
    names = roles.attach(model, "student", LoRaDConfig(r=4, target_modules=FAKE))
    assert names
    assert names == [key for key, layer in model.named_modules() if hasattr(layer, "lorad_A")]


def test_a_taken_name_is_refused():
    with pytest.raises(WadiError, match="'student'"):
        roles.attach(both(), "student", LoRaDConfig(r=4, target_modules=STUDENT))


@pytest.mark.parametrize(
    ("pattern", "word"),
    [("nothing_like_this", "nothing_like_this"), (r".*(unclosed", "unclosed"), (r".*norm1", "norm1")],
)
def test_bad_targets_are_one_clear_error(pattern, word):
    with pytest.raises(WadiError, match=word):
        roles.attach(network(), "student", LoRaDConfig(r=4, target_modules=pattern))


def test_a_network_with_an_adapter_is_no_teacher():
    from peft import LoraConfig

    model = network()
    roles.refuse_adapted(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(WadiError, match=r"to_q.*fuse_lora"):
        roles.refuse_adapted(model)


# --- adapters that someone made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("end", ["lorad_A", "lorad_B"])
def test_angles_that_are_not_finite_are_refused_and_the_tensor_named(tmp_path, value, end):
    model = nn.Sequential(nn.Linear(6, 5))
    roles.attach(model, "student", LoRaDConfig(r=2, target_modules="0"))
    roles.save(model, "student", tmp_path / "student")
    tensors = load_file(tmp_path / "student" / roles.WEIGHTS)
    name = next(name for name in tensors if name.endswith(end))
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "student" / roles.WEIGHTS)
    with pytest.raises(WadiError, match=re.escape(name)):
        roles.load(nn.Sequential(nn.Linear(6, 5)), tmp_path / "student", "student")


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_regular_expression_that_never_ends_is_refused(tmp_path, monkeypatch, setting):
    monkeypatch.setattr(patterns, "TIME_LIMIT", 0.2)
    pattern = r"(x|xx)+[yz]"

    def made():
        return nn.ModuleDict({"x" * 60: nn.Linear(6, 5), "z": nn.Linear(6, 5)})

    model = made()
    roles.attach(model, "student", LoRaDConfig(r=2, target_modules=".+"))
    roles.save(model, "student", tmp_path / "student")
    config = tmp_path / "student" / roles.CONFIG
    value = {pattern: 3} if setting == "rank_pattern" else pattern
    config.write_text(json.dumps({**json.loads(config.read_text()), setting: value}))
    start = time.monotonic()
    with pytest.raises(WadiError, match=setting):
        roles.load(made(), tmp_path / "student", "student")
    assert time.monotonic() - start < 20


def test_patterns_mean_what_peft_takes_them_to_mean(tmp_path):
    """The first pattern of ranks that matches counts; what is excluded has no angles; what is saved has the patterns."""

    def made():
        return nn.ModuleDict({name: nn.Linear(12, 12) for name in ("to_q", "to_k", "to_v", "out")})

    config = LoRaDConfig(
        r=2, target_modules="to_.|out", exclude_modules="to_k", rank_pattern={"to_q": 3, "to_.": 4, "nothing": 5}
    )
    model = made()
    assert roles.attach(model, "student", config) == ["to_q", "to_v", "out"]
    ranks = {key.split(".")[0]: len(B) for key, B in roles.parameters(model, "student").items() if key.endswith("B")}
    assert ranks == {"to_q": 3, "to_v": 4, "out": 2}
    roles.save(model, "student", tmp_path / "student")
    stored = json.loads((tmp_path / "student" / roles.CONFIG).read_text())
    assert stored["target_modules"] == "to_.|out"
    assert stored["rank_pattern"] == {"to_q": 3, "to_.": 4, "nothing": 5}
