"""A role may carry an adapter of any PEFT method, not of LoRaD alone."""

import json
import re
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

import tiny
from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.distill.batch import Batch
from wadi.distill.checkpoints import load, save
from wadi.distill.health import weight_change_stats
from wadi.distill.objectives import make_objective
from wadi.distill.optimizers import initial_state
from wadi.distill.setup import attach_roles
from wadi.distill.step import as_numbers, train_step
from wadi.errors import WadiError
from wadi.roles import methods

TARGETS = r".*attn\d\.(to_q|to_k|to_v|to_out\.0)"
OPTIONS = {"oft": {"oft_block_size": 4}, "boft": {"boft_block_size": 4}, "road": {"group_size": 8}}
METHODS = tuple(methods.METHODS)


def config_of(method, role="student", targets=TARGETS):
    return methods.adapter_config(method, role, 2, OPTIONS.get(method, {}), targets)


def attach(unet, role, method):
    return roles.attach(unet, role, config_of(method, role), methods.method(method).frozen)


@pytest.fixture
def unet(sd_folder):
    return load_pipeline(sd_folder).unet.eval()


def call(unet, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    words = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    return unet(x, torch.tensor([500, 500]), words).sample


def in_role(unet, role):
    with torch.no_grad(), roles.active(unet, role):
        return call(unet)


def disturb(unet, role, seed=1, only_trained=False):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (roles.trained_parameters if only_trained else roles.parameters)(unet, role).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


# HRA and full also around a layer of another method
PAIRS = [*((method, method) for method in METHODS), ("lorad", "hra"), ("dora", "hra"), ("lora", "full"), ("full", "oft")]


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_a_role_starts_as_the_teacher_and_then_differs(unet, method, other):
    plain = call(unet).detach()
    layers = attach(unet, "student", method)
    attach(unet, "fake", other)
    assert layers == roles.adapted_layers(unet, "student")
    assert all(layer.split(".")[-1] in ("to_q", "to_k", "to_v", "0") for layer in layers)
    torch.testing.assert_close(in_role(unet, "student"), plain, atol=1e-5, rtol=1e-4)
    disturb(unet, "student")
    assert torch.equal(in_role(unet, None), plain)
    assert (in_role(unet, "student") - plain).abs().max() > 1e-3
    torch.testing.assert_close(in_role(unet, "fake"), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_only_the_adapter_of_the_role_gets_a_gradient(unet, method, other):
    for role, name in (("student", method), ("fake", other)):
        attach(unet, role, name)
        disturb(unet, role)
    with roles.active(unet, "student"):
        loss = call(unet).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in roles.trained_parameters(unet, "student").values())
    assert all(p.grad is None for p in roles.parameters(unet, "fake").values())
    own = {id(p) for role in ("student", "fake") for p in roles.parameters(unet, role).values()}
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters() if id(p) not in own)


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_peft_reads_the_folder_of_a_role(unet, sd_folder, tmp_path, method, other):
    from peft import PeftModel

    attach(unet, "student", method)
    attach(unet, "fake", other)
    disturb(unet, "student")
    roles.save(unet, "student", tmp_path / "student")
    assert load_file(tmp_path / "student" / roles.WEIGHTS).keys() == roles.state_dict(unet, "student").keys()
    again = PeftModel.from_pretrained(load_pipeline(sd_folder).unet.eval(), tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(call(again), in_role(unet, "student"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_a_fused_role_is_the_plain_architecture(unet, method, other):
    names = unet.state_dict().keys()
    attach(unet, "student", method)
    attach(unet, "fake", other)
    disturb(unet, "student")
    disturb(unet, "fake")
    student = in_role(unet, "student")
    with torch.no_grad():
        torch.testing.assert_close(call(roles.fuse(unet, "student")), student, atol=1e-4, rtol=1e-3)
    assert unet.state_dict().keys() == names


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_the_base_tensors_are_those_of_the_plain_network(unet, method, other):
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    attach(unet, "student", method)
    attach(unet, "fake", other)
    disturb(unet, "student")
    base = roles.base_tensors(unet)
    assert list(base) == list(plain)
    assert all(torch.equal(base[name], value) for name, value in plain.items())


@pytest.mark.parametrize(("method", "other"), PAIRS)
def test_the_merged_weights_are_those_of_the_fused_role_and_nothing_changes(unet, method, other):
    attach(unet, "student", method)
    attach(unet, "fake", other)
    disturb(unet, "student", only_trained=True)
    student = in_role(unet, "student")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    merged = {layer: (W, S) for layer, W, S in roles.merged_weights(unet, "student")}
    assert list(merged) == roles.adapted_layers(unet, "student")
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert torch.equal(in_role(unet, "student"), student)
    stats = weight_change_stats(unet, "student")
    assert 1e-5 < stats["student_direction_change"] < 1
    if method in ("lorad", "dora-frozen", "hra"):  # OFT's rotations are approximate, RoAd's have a scale
        assert stats["student_norm_change"] < 1e-6
    if method in ("lora", "dora", "full"):
        assert stats["student_norm_change"] > 1e-3
    for layer, (W, _) in merged.items():
        assert any(torch.equal(W, before.get(f"{layer}{base}.weight", W[:0])) for base in (".base_layer", ".base_layer" * 2))
    fused = roles.fuse(unet, "student").state_dict()
    for layer, (_, S) in merged.items():
        torch.testing.assert_close(S, fused[f"{layer}.weight"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_in_float32_on_a_half_precision_network(unet, method, dtype):
    unet.to(dtype)
    attach(unet, "student", method)
    assert {p.dtype for p in roles.parameters(unet, "student").values()} == {torch.float32}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lorad"])
def test_a_step_trains_and_a_checkpoint_restores_roles_of_another_method(sd_folder, prompts_path, tmp_path, method):
    """The training step and the checkpoint know nothing about the method. Angle statistics are left out."""
    role = {"adapter": method, "adapter_options": OPTIONS.get(method, {}), "target_modules": TARGETS}
    config = tiny.settings(
        sd_folder, prompts_path, tmp_path / "run", gradient_checkpointing=True, student={**role, "ema": 0.9}, fake=role
    )

    def ready():
        backbone = from_pipeline(load_pipeline(sd_folder))
        attach_roles(backbone, config)
        return backbone, initial_state(backbone.network, config, torch.device("cpu"))

    backbone, state = ready()
    before = {role: {k: v.clone() for k, v in roles.parameters(state.network, role).items()} for role in state.optimizers}
    trained = {role: set(roles.trained_parameters(state.network, role)) for role in before}
    condition, null = backbone.encode(["red apple"] * config.batch), backbone.encode([""])
    z = torch.randn(config.batch, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # at the first step teacher and fake model agree, so the student stays
        numbers = as_numbers(
            train_step(backbone, Batch(condition, null, z, z[:0]), [700], make_objective(config), config, state), state.network
        )
        state.step += 1
    assert {"loss_student", "loss_fake"} <= numbers.keys()
    assert not any("angle" in name for name in numbers)
    for role, values in before.items():
        moved = {
            re.split(r"\.[a-z]+_[^.]*(?:$|\.weight$)", key)[0]
            for key, p in roles.parameters(state.network, role).items()
            if not torch.equal(p, values[key])
        }
        assert not any("magnitude" in key for key in trained[role]) or method == "dora"
        assert all(
            torch.equal(values[key], p) for key, p in roles.parameters(state.network, role).items() if key not in trained[role]
        )
        assert len(moved) > 0.9 * len(roles.adapted_layers(state.network, role))  # every layer that the loss reaches

    path = save(tmp_path / "checkpoints", state, "teacher", 1)
    _, restored = ready()
    load(path, restored, "teacher")
    for role in before:
        found, expected = roles.parameters(restored.network, role), roles.parameters(state.network, role)
        assert all(torch.equal(found[key], p) for key, p in expected.items())


@pytest.mark.parametrize("other", ["dora-frozen", "lora", "lorad"])
def test_a_frozen_magnitude_stays_frozen_and_in_the_file(unet, sd_folder, tmp_path, other):
    """Also after another adapter is attached or loaded, and where PEFT puts both into one layer."""
    third = load_pipeline(sd_folder).unet
    attach(third, "third", other)
    roles.save(third, "third", tmp_path / "third")
    order = [("student", "dora-frozen"), ("fake", other)]
    for role, method in reversed(order) if other == "lorad" else order:
        attach(unet, role, method)
    if other != "lorad":
        roles.load(unet, tmp_path / "third", "third")
    frozen = {key for key, p in roles.parameters(unet, "student").items() if not p.requires_grad}
    assert frozen == {key for key in roles.parameters(unet, "student") if "magnitude" in key} != set()
    assert not any("magnitude" in key for key in roles.trained_parameters(unet, "fake"))
    with roles.active(unet, "student"):
        call(unet).square().sum().backward()
    assert all(p.grad is None for key, p in roles.parameters(unet, "student").items() if key in frozen)
    assert all(p.grad is not None for p in roles.trained_parameters(unet, "student").values())
    roles.save(unet, "student", tmp_path / "student")
    assert sum("magnitude" in key for key in load_file(tmp_path / "student" / roles.WEIGHTS)) == len(frozen)


@pytest.mark.parametrize(
    ("method", "options", "targets", "value"),
    [
        ("road", {}, r"conv_in", "Conv2d"),
        ("road", {"group_size": 7}, TARGETS, "group"),
        ("oft", {}, r".*conv1", "3x3"),
        ("boft", {"boft_block_size": 5}, TARGETS, "5"),
        ("full", {}, r".*norm1", "norm1"),
    ],
)
def test_a_method_that_cannot_adapt_a_layer_names_the_reason(unet, method, options, targets, value):
    with raises_naming(value):
        roles.attach(unet, "student", methods.adapter_config(method, "student", None, options, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["dora", "dora-frozen"])
def test_the_norms_of_dora_are_exact_in_half_precision(unet, method, dtype):
    unet.to(dtype)
    roles.attach(unet, "student", methods.adapter_config(method, "student", 2, {}, r".*(to_q|conv1)"))
    magnitudes = {key: value for key, value in roles.parameters(unet, "student").items() if "magnitude" in key}
    assert len(magnitudes) > 2
    for key, value in magnitudes.items():
        W = unet.get_submodule(key.split(".lora_")[0]).get_base_layer().weight.float().flatten(1)
        torch.testing.assert_close(value.flatten(), W.norm(dim=1), rtol=1e-6, atol=0)


HOSTILE = [
    ("alpha_pattern", {"([a-z0-9_.]+": 1}), ("rank_pattern", {"to_q": "a"}), ("rank_pattern", ["to_q"]),
    ("alpha_pattern", {"to_q": None}), ("rank_pattern", {"to_q": 60_000}), ("r", 60_000), ("r", 10**9), ("r", "4"), ("r", 1.5),
    ("lora_alpha", "x"), ("lora_alpha", None), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
    ("use_rslora", "yes"), ("exclude_modules", 5), ("target_modules", 7), ("target_modules", None), ("target_modules", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), HOSTILE, ids=lambda value: str(value)[:24])
def test_a_hostile_adapter_config_is_one_clear_error(unet, setting, value, tmp_path):
    roles.attach(unet, "student", methods.adapter_config("lora", "student", 2, {}, TARGETS))
    roles.save(unet, "student", tmp_path / "adapter")
    file = tmp_path / "adapter" / roles.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    network = roles.fuse(unet, "student")
    with pytest.raises(WadiError) as error:
        roles.load(network, tmp_path / "adapter", "student")
    named = str(error.value).replace("_", " ")
    assert setting.replace("_", " ") in named or "rank" in named or "number" in named


def test_a_pattern_that_would_match_for_ever_ends(unet):
    """PEFT matches it itself; here it stands for no layer, or takes too long and is named."""
    options = {"alpha_pattern": {"([a-z0-9_.]+)+!": 1}}
    with suppress(WadiError):
        roles.attach(unet, "student", methods.adapter_config("lora", "student", 2, options, TARGETS))


def test_every_option_of_a_method_is_one_of_its_config():
    for name, method in methods.METHODS.items():
        fields = methods.adapter_config(name, "student", None, {}, TARGETS).to_dict()
        assert set(method.options) | set(method.fixed) <= set(fields), name


def test_options_and_ranks_that_a_method_does_not_have_are_named():
    with raises_naming("dora2", *methods.METHODS):
        methods.adapter_config("dora2", "student", None, {}, TARGETS)
    for name in methods.METHODS:
        with raises_naming("fake", "init_lora_weights", name):
            methods.adapter_config(name, "fake", None, {"init_lora_weights": "pissa"}, TARGETS)
    with raises_naming("student.adapter_options.coft", "'yes'", "bool"):
        methods.adapter_config("oft", "student", None, {"coft": "yes"}, TARGETS)
    with raises_naming("student.rank", 3, "hra"):  # an odd number of reflections is not the identity
        methods.adapter_config("hra", "student", 3, {}, TARGETS)
    with raises_naming("student"):
        methods.adapter_config("oft", "student", None, {"r": 2, "oft_block_size": 4}, TARGETS)
