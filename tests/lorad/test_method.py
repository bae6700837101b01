"""LoRaD as a PEFT method: settings, adapters by name, files, and errors."""

import copy
import json
import warnings

import peft
import pytest
import torch
from lorad_toys import Toy, adapted, angles, inputs, randomise
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn.utils import parametrizations

import wadi
from raising import raises_naming
from wadi import WadiError
from wadi.lorad import LoRaDConfig, LoRaDLayer

LAYERS = ["lin", "conv", "head"]


def ranks(model, adapter="default"):
    return {name.rpartition(".")[2]: m.r[adapter] for name, m in model.named_modules() if isinstance(m, LoRaDLayer)}


def test_parameters_have_the_shapes_and_numbers_of_the_paper():
    model = adapted(random=False, r=4)
    shapes = {name.split(".")[-3]: {} for name in angles(model)}
    for name, p in angles(model).items():
        shapes[name.split(".")[-3]][name.split(".")[-2]] = tuple(p.shape)
    assert shapes["lin"] == {"lorad_A": (16, 4), "lorad_B": (4, 4)}  # fan-in 9: four pairs and one column left
    assert shapes["conv"] == {"lorad_A": (6, 4), "lorad_B": (4, 4)}  # (4 / 2 groups) * 2 * 2 = 8
    assert shapes["head"] == {"lorad_A": (5, 4), "lorad_B": (4, 27)}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(4 * (o + i // 2) for o, i in ((16, 9), (6, 8), (5, 54)))
    for name, p in angles(model).items():
        assert bool(p.any()) == ("lorad_B" in name)  # A starts at zero, B does not


def test_the_config_is_at_hand_in_the_package():
    assert wadi.LoRaDConfig is LoRaDConfig
    assert LoRaDConfig().peft_type == "LORAD"


@pytest.mark.parametrize("r", [0, -3, 2.5, True])
def test_a_rank_that_is_not_a_positive_integer_is_an_error(r):
    with raises_naming(f"r is {r!r}"):
        LoRaDConfig(r=r)
    with raises_naming(f"rank_pattern['lin'] is {r!r}"):
        LoRaDConfig(rank_pattern={"lin": r})


def test_wrong_settings_and_combinations_are_named():
    for kwargs in (
        {"bias": "some"},
        {"excess_rank": "maybe"},
        {"target_modules": "all", "layers_to_transform": [1]},
        {"target_modules": "all", "layers_pattern": "h"},
        {"target_modules": ["a"], "layers_pattern": "h"},
    ):
        with raises_naming(list(kwargs)[-1]):
            LoRaDConfig(**kwargs)


def test_rank_pattern_and_excess_rank():
    assert ranks(adapted(r=2, rank_pattern={"conv": 3, "h.ad": 1})) == {"lin": 2, "conv": 3, "head": 1}
    assert ranks(adapted(r=20)) == {"lin": 20, "conv": 20, "head": 20}
    assert ranks(adapted(r=20, excess_rank="cap")) == {"lin": 4, "conv": 4, "head": 5}
    with raises_naming("lin", "20", "rank 4", "rank_pattern"):
        adapted(r=20, excess_rank="refuse")


def test_capping_the_rank_loses_no_reachable_angle():
    """A rank above the cap spans the same angle matrices: any product A B of rank 20 has rank 4 here."""
    layer = adapted(r=20).base_model.model.lin
    theta = layer.lorad_A["default"] @ layer.lorad_B["default"]
    assert torch.linalg.matrix_rank(theta.detach()) == 4


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(tmp_path, low_cpu_mem_usage):
    model = adapted(rank_pattern={"conv": 2}, recompute=True)
    y = model(inputs())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAD"
    loaded = peft.PeftModel.from_pretrained(Toy(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(inputs()), y)
    assert all(m.recompute == {"default": True} for m in loaded.modules() if isinstance(m, LoRaDLayer))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_half_precision_file_is_widened(tmp_path, low_cpu_mem_usage):
    model = adapted()
    state = {k: v.bfloat16() for k, v in get_peft_model_state_dict(model).items()}
    other = peft.inject_adapter_in_model(LoRaDConfig(r=3, target_modules=LAYERS), Toy(), low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    for p, due in zip(angles(other).values(), angles(model).values(), strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, due.bfloat16().float())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_injection_into_a_half_precision_model_makes_float32_angles(half):
    model = peft.inject_adapter_in_model(LoRaDConfig(r=3, target_modules=LAYERS), Toy().to(half))
    assert {p.dtype for p in angles(model).values()} == {torch.float32}


def test_half_precision_angles_only_on_request_with_a_warning_and_computed_in_float32():
    base, config = Toy().bfloat16(), LoRaDConfig(r=3, target_modules=["lin"])
    with pytest.warns(UserWarning, match="loses small updates"):
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    assert {p.dtype for p in angles(model).values()} == {torch.bfloat16}
    randomise(model)
    layer = model.base_model.model.lin
    from wadi.lorad import pair_angles

    assert pair_angles(layer._factors(["default"])).dtype == torch.float32
    model(inputs().bfloat16()).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in angles(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(Toy(), config, autocast_adapter_dtype=False)


def test_adapters_come_and_go():
    model, x = adapted(), inputs()
    first = model(x)
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin"], init_weights=False))
    assert torch.equal(model(x), first)
    assert not any(p.requires_grad for p in angles(model, "b").values())
    model.set_adapter("b")
    assert not torch.allclose(model(x), first)
    assert all(p.requires_grad for p in angles(model, "b").values())
    model.set_adapter("default")
    model.delete_adapter("b")
    assert not angles(model, "b")
    assert torch.equal(model(x), first)
    assert all("b" not in m.scaling and "b" not in m.r for m in model.modules() if isinstance(m, LoRaDLayer))


def test_modules_to_save_exclusion_and_layer_choice():
    model = adapted(target_modules=["lin", "conv"], exclude_modules=["conv"], modules_to_save=["head"])
    assert set(ranks(model)) == {"lin"}
    assert any(p.requires_grad and "head" in n for n, p in model.named_parameters())
    blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(3)])
    stack = nn.ModuleDict({"body": nn.ModuleDict({"layers": blocks})})
    config = LoRaDConfig(r=2, target_modules=["proj"], layers_to_transform=[1])
    model = peft.inject_adapter_in_model(config, stack)
    assert [isinstance(block["proj"], LoRaDLayer) for block in model["body"]["layers"]] == [False, True, False]


def test_weighted_adapters_are_exact_where_their_layers_and_ranks_differ(tmp_path):
    model, x = adapted(target_modules=["lin", "head"]), inputs()
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin", "conv"]))
    randomise(model)
    layers = [m for m in model.modules() if isinstance(m, LoRaDLayer)]
    for layer in layers:
        layer.set_scale("default", 0.7 * 2.0)
        layer.set_scale("b", -1.5)
    model.base_model.set_adapter(["default", "b"])
    due = model(x)
    for layer in layers:
        layer.set_scale("default", 2.0)
        layer.set_scale("b", 1.0)
    model.add_weighted_adapter(["default", "b"], [0.7, -1.5], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), due)
    assert ranks(model, "sum") == {"lin": 5, "head": 3, "conv": 2}
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(Toy(), tmp_path / "sum")
    torch.testing.assert_close(loaded(x), due)


def test_a_weighted_adapter_tells_a_layer_from_one_whose_name_ends_alike():
    """FLUX has ``proj_out`` and ``single_transformer_blocks.0.proj_out``."""
    blocks = nn.ModuleList([nn.ModuleDict({"proj_out": nn.Linear(6, 5)}) for _ in range(2)])
    network = nn.ModuleDict({"blocks": blocks, "proj_out": nn.Linear(8, 12)})
    model = peft.get_peft_model(network, LoRaDConfig(r=2, target_modules=["proj_out"]))
    model.add_adapter("b", LoRaDConfig(r=2, rank_pattern={"^proj_out": 3}, target_modules=["proj_out"]))
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum")
    found = {name: layer.r["sum"] for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoRaDLayer)}
    assert found == {"blocks.0.proj_out": 4, "blocks.1.proj_out": 4, "proj_out": 5}


def test_a_weighted_adapter_that_fails_leaves_nothing(monkeypatch):
    model = adapted(target_modules=["lin", "head"])
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin", "head"]))
    plain, calls = LoRaDLayer.update_layer, []

    def second_fails(layer, name, *rest, **options):
        calls.append(name)
        if len(calls) == 2:
            raise MemoryError
        return plain(layer, name, *rest, **options)

    monkeypatch.setattr(LoRaDLayer, "update_layer", second_fails)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "b"}
    assert not angles(model, "sum")


def test_weighted_adapters_that_cannot_be():
    model = adapted()
    model.add_adapter("re", LoRaDConfig(r=2, target_modules=".*lin"))
    for call in (
        (["default", "none"], [1.0, 1.0], "new"),
        (["default"], [1.0, 2.0], "new"),
        ([], [], "new"),
        (["default"], [1.0], "re"),
        (["default"], [1.0], "new", "svd"),
        (["default", "re"], [1.0, 1.0], "new"),
    ):
        with pytest.raises(WadiError, match=r"add_weighted_adapter|combination_type"):
            model.add_weighted_adapter(*call)
    assert set(model.peft_config) == {"default", "re"}


def test_one_adapter_per_sample_of_a_batch():
    model, x = adapted(), inputs()
    model.add_adapter("b", LoRaDConfig(r=2, target_modules=["lin"], init_weights=False))
    model.eval()
    names = ["__base__", "default", "b", "default", "b", "b", "__base__"]
    mixed = model(x, adapter_names=names)
    rows = {"default": model(x)}
    with model.disable_adapter():
        rows["__base__"] = model(x)
    model.set_adapter("b")
    rows["b"] = model(x)
    torch.testing.assert_close(mixed, torch.stack([rows[name][k] for k, name in enumerate(names)]))
    with raises_naming("adapter(s) c"):
        model(x, adapter_names=["c"] * 7)
    with raises_naming("1 `adapter_names`", "batch of 7"):
        model(x, adapter_names=["b"])
    with raises_naming("`adapter_names`", "eval()"):
        model.train()(x, adapter_names=names)


class HiddenLinear(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def integer_weight():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Linear(1, 4), "fan-in is 1"),
        (nn.Conv2d(2, 4, 1, groups=2), "fan-in is 1"),
        (nn.Embedding(4, 4), "only Linear and Conv2d"),
        (nn.Conv1d(2, 4, 3), "only Linear and Conv2d"),
        (HiddenLinear(4, 4), "weight is hidden"),
        (integer_weight(), "weight is hidden"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "weight is hidden"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), "weight is hidden"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_that_cannot_be_rotated_are_named(layer, why):
    model = nn.Sequential()
    model.add_module("middle", nn.Sequential(layer))
    with raises_naming("middle.0", type(layer).__name__, why, "exclude_modules"):
        peft.inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["0"]), model)


def test_a_layer_with_an_adapter_of_another_method_is_an_error():
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lin"]), Toy())
    with raises_naming("lin"):
        peft.inject_adapter_in_model(LoRaDConfig(target_modules=["lin"]), model, "second")


class FakeQuantised(nn.Module):
    """A layer whose weight is stored quantised and dequantised by a backend, as with bitsandbytes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("codes", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes.float() / 64, self.bias)


class FakeBackend:
    layer_type, backend_name = "linear", "fake"

    def get_base_weight(self, base_layer):
        return base_layer.codes.float() / 64

    def set_base_weight(self, peft_layer, weight):
        peft_layer.get_base_layer().codes = (weight * 64).round().to(torch.int8)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_quantised_layer_is_rotated_through_its_backend(monkeypatch, recompute):
    from wadi.lorad import model as module

    backends = {FakeQuantised: FakeBackend()}
    monkeypatch.setattr(module, "resolve_quantization_backend", lambda layer, **_: backends.get(type(layer)))
    plain = nn.Linear(6, 4)
    quantised = FakeQuantised(plain)
    plain.weight.data = quantised.codes.float() / 64
    models = [
        adapted(nn.Sequential(copy.deepcopy(layer)), target_modules=["0"], recompute=recompute) for layer in (plain, quantised)
    ]
    x = inputs(3, 6)
    y, z = (model(x) for model in models)
    assert torch.equal(y, z)
    for out in (y, z):
        out.square().sum().backward()
    for p, q in zip(*(angles(m).values() for m in models), strict=True):
        assert torch.equal(p.grad, q.grad)
    models[1].merge_adapter()
    assert (models[1](x) - z).abs().max() < 6 * x.abs().max() / 64


def test_a_layer_that_cannot_be_dequantised_is_an_error(monkeypatch):
    from wadi.lorad import model as module

    class ForwardOnlyQuantizationBackend(FakeBackend):
        backend_name = "gptq"

    monkeypatch.setattr(module, "resolve_quantization_backend", lambda *_, **__: ForwardOnlyQuantizationBackend())
    with raises_naming("head", "gptq"):
        adapted(target_modules=["head"])


def test_an_offloaded_weight_is_an_error_that_says_so():
    model = adapted()
    model.base_model.model.lin.base_layer.to("meta")
    with raises_naming("meta device"):
        model(inputs())


def test_conversion_to_lora_at_full_rank_is_the_rotation():
    model, x = adapted(target_modules=["lin"]), inputs()
    config, state = peft.convert_to_lora(model, rank=9)
    lora = peft.get_peft_model(Toy(), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-4)
