"""LoRA files as trainers write them: every key is used or named, and the change follows the format's formula."""

import json
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raising import raises_naming
from wadi.backbones import load_pipeline
from wadi.errors import WadiError
from wadi.extras.lora.apply import apply_lora

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import small_pipelines

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 x 32
CONV = "down_blocks.1.resnets.0.conv1"  # 32 x 16 x 3 x 3
TEXT = "encoder.layers.1.self_attn.q_proj"
KOHYA_TEXT = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    small_pipelines.make("sdxl", folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    small_pipelines.make("flux", folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def weights(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": value.clone() for part, module in parts.items() for name, value in module.state_dict().items()}


def applied(folder, file, scale=1.0):
    """Return ``(number of layers, {weight: its change}, weights before)``."""
    pipeline = load_pipeline(folder)
    before = weights(pipeline)
    count = apply_lora(pipeline, file, scale)
    after = weights(pipeline)
    changed = {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    return count, changed, before


def check_changes(folder, file, expected, scale=1.0):
    count, changed, before = applied(folder, file, scale)
    expected = {name: value(before[name]) if callable(value) else value for name, value in expected.items()}
    assert changed.keys() == expected.keys()
    assert count == len(expected)
    for name, value in expected.items():
        torch.testing.assert_close(changed[name], scale * value, rtol=1e-4, atol=1e-4)


def lora(name, out=32, inner=32, rank=2, alpha=1.0, seed=0, down="lora_down", up="lora_up"):
    """``(tensors, change)`` as kohya writes a layer."""
    A, B = normal(rank, inner, seed=seed), normal(out, rank, seed=seed + 1)
    tensors = {f"{name}.{down}.weight": A, f"{name}.{up}.weight": B}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors, (1.0 if alpha is None else alpha / rank) * B @ A


def layer_of(folder, part, prefix):
    return next(name for name in weights(load_pipeline(folder)) if name.startswith(part) and prefix in name)


# --- kohya ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [("q_proj",), ("q_proj", "v_proj"), ("k_proj", "out_proj"), ("fc1",), ("q_proj", "fc2")])
def test_a_lora_of_some_layers_of_the_text_encoder(which, sd_folder, tmp_path):
    tensors, expected = {}, {}
    for seed, name in enumerate(which):
        block = "mlp" if name.startswith("fc") else "self_attn"
        full = layer_of(sd_folder, "text_encoder.", f"layers.1.{block}.{name}.weight")
        out, inner = {"fc1": (37, 32), "fc2": (32, 37)}.get(name, (32, 32))
        some, change = lora(f"lora_te_text_model_encoder_layers_1_{block}_{name}", out, inner, seed=seed)
        tensors |= some
        expected[full] = change
    unet, change = lora("lora_unet_" + TO_Q.replace(".", "_"), seed=9)
    save_file(tensors | unet, tmp_path / "style.safetensors")
    check_changes(sd_folder, tmp_path / "style.safetensors", expected | {f"unet.{TO_Q}.weight": change}, 0.7)
    save_file(tensors, tmp_path / "text.safetensors")
    check_changes(sd_folder, tmp_path / "text.safetensors", expected)


@pytest.mark.parametrize("dotted", [False, True])
def test_sdxl_in_the_names_of_the_original_checkpoint(dotted, sdxl_folder, tmp_path):
    """sd-scripts trains SDXL on the original U-Net (ComfyUI writes dots): numbers follow from ``layers_per_block``."""
    names = {
        "input_blocks.3.1.transformer_blocks.1.attn2.to_v": "unet.down*1.attentions.0.*1.attn2.to_v",
        "middle_block.1.transformer_blocks.0.ff.net.2": "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "output_blocks.1.1.transformer_blocks.0.attn1.to_out.0": "unet.up*0.attentions.1.*.0.attn1.to_out.0",
        "time_embed.0": "unet.time_embedding.linear_1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.*layers.0.mlp.fc1",
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj": "text_encoder_2.*layers.1.self_attn.out_proj",
        "lora_te2_text_projection": "text_encoder_2.text_projection",
    }
    tensors, expected = {}, {}
    own = weights(load_pipeline(sdxl_folder))
    for seed, (name, layer) in enumerate(names.items()):
        (full,) = [key for key in own if fnmatch(key, f"{layer}.weight")]
        spelled = f"diffusion_model.{name}" if dotted else f"lora_unet_{name.replace('.', '_')}"
        some, expected[full] = lora(name if "lora_te" in name else spelled, *own[full].shape, seed=seed)
        tensors |= some
    save_file(tensors, tmp_path / "style.safetensors")
    check_changes(sdxl_folder, tmp_path / "style.safetensors", expected)


def test_fluxs_joined_projections(flux_folder, tmp_path):
    """kohya and ComfyUI train ``qkv`` as one layer; diffusers has three."""
    for name, down, up in (
        ("lora_unet_double_blocks_0_img_attn_qkv", "lora_down", "lora_up"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "lora_A", "lora_B"),
    ):
        tensors, change = lora(name, 96, 32, alpha=1.0 if "lora_unet" in name else None, down=down, up=up)
        save_file(tensors, tmp_path / "style.safetensors")
        block = "transformer.transformer_blocks.0.attn."
        expected = {f"{block}to_{x}.weight": part for x, part in zip("qkv", change.chunk(3), strict=True)}
        check_changes(flux_folder, tmp_path / "style.safetensors", expected)


def test_fluxs_joined_projections_with_both_text_encoders(flux_folder, tmp_path):
    """The layers of both text encoders change too, although diffusers' converter drops T5's keys."""
    tensors, change = lora("lora_unet_double_blocks_0_img_attn_qkv", 96, 32)
    expected = {
        f"transformer.transformer_blocks.0.attn.to_{x}.weight": part for x, part in zip("qkv", change.chunk(3), strict=True)
    }
    own = weights(load_pipeline(flux_folder))
    for prefix, part, layer in (
        ("lora_te1_text_model_", "text_encoder.", "encoder.layers.0.mlp.fc1"),
        ("lora_te2_", "text_encoder_2.", "encoder.block.0.layer.0.SelfAttention.k"),
    ):
        (full,) = [name for name in own if name.startswith(part) and name.endswith(f"{layer}.weight")]
        some, expected[full] = lora(prefix + layer.replace(".", "_"), *own[full].shape, seed=len(tensors))
        tensors |= some
    save_file(tensors, tmp_path / "style.safetensors")
    check_changes(flux_folder, tmp_path / "style.safetensors", expected)
    other, _ = lora("lora_te2_encoder_block_7_layer_0_SelfAttention_k")
    assert "lora_te2_encoder_block_7" in error_of(flux_folder, tensors | other, tmp_path)


# --- PEFT and diffusers -----------------------------------------------------------------------------------------------------


def peft_folder(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 4.0), ({"lora_alpha": 1}, 0.5), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"attn1.to_q": 6}}, 3.0),
        ({"alpha_pattern": {"other": 6}}, 4.0),
    ],
)  # fmt: skip
def test_peft_folders_and_files(config, factor, sd_folder, tmp_path):
    tensors, change = lora(f"base_model.model.{TO_Q}", alpha=None, down="lora_A", up="lora_B")
    folder = peft_folder(tmp_path / "adapter", tensors, **config)
    for path in (folder, folder / "adapter_model.safetensors"):
        check_changes(sd_folder, path, {f"unet.{TO_Q}.weight": factor * change})


def test_peft_adapters_change_the_weights_as_peft_merges_them(sd_folder, tmp_path):
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    targets = r".*(attn1\.to_q|resnets\.0\.conv1)"
    for config in (
        LoraConfig(r=3, lora_alpha=5, target_modules=targets),
        LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True),
        LoHaConfig(r=3, alpha=2, target_modules=targets),
        LoHaConfig(r=3, alpha=2, target_modules=targets, use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=3, target_modules=targets),
        LoKrConfig(r=2, alpha=3, target_modules=targets, use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
    ):
        torch.manual_seed(1)
        model = get_peft_model(load_pipeline(sd_folder).unet, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
                assert any(mark in name for mark in ("lora", "hada", "lokr"))
        folder = tmp_path / f"{config.peft_type.value}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        pipeline = load_pipeline(sd_folder)
        count = apply_lora(pipeline, folder)
        merged = model.merge_and_unload().state_dict()
        plain = load_pipeline(sd_folder).unet.state_dict()
        assert count == sum(not torch.equal(merged[name], plain[name]) for name in plain) > 1
        for name, value in pipeline.unet.state_dict().items():
            torch.testing.assert_close(value, merged[name], rtol=1e-4, atol=1e-4)


def test_diffusers_own_settings_in_the_header(sd_folder, tmp_path):
    from peft import LoraConfig

    tensors, change = lora(f"unet.{TO_Q}", alpha=None, down="lora_A", up="lora_B")
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["attn1.to_q"]).to_dict()
    about = json.dumps({f"unet.{name}": value for name, value in settings.items()}, default=list)
    save_file(tensors, tmp_path / "style.safetensors", {"format": "pt", "lora_adapter_metadata": about})
    check_changes(sd_folder, tmp_path / "style.safetensors", {f"unet.{TO_Q}.weight": 3 * change})
    pipeline = load_pipeline(sd_folder)
    before = weights(pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(weights(pipeline)[f"unet.{TO_Q}.weight"], before[f"unet.{TO_Q}.weight"] + 3 * change)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora", TO_Q),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora", TO_Q[:-10] + "attn2.to_out.0"),
        (f"unet.{TO_Q}.lora", TO_Q),
        (f"diffusion_model.{TO_Q}.lora", TO_Q),
    ],
)
def test_names_that_diffusers_used_before(module, layer, sd_folder, tmp_path):
    inner = 32
    A, B = normal(2, inner), normal(32, 2)
    save_file({f"{module}.down.weight": A, f"{module}.up.weight": B}, tmp_path / "old.safetensors")
    check_changes(sd_folder, tmp_path / "old.safetensors", {f"unet.{layer}.weight": B @ A})


def test_a_peft_adapter_of_a_family_without_a_loader_in_diffusers(tmp_path):
    pipeline = small_pipelines.make("pixart-sigma", tmp_path)
    name = "transformer_blocks.0.attn1.to_q"
    A, B = normal(2, 24), normal(24, 2)
    tensors = {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    before = pipeline.transformer.get_submodule(name).weight.clone()
    assert apply_lora(pipeline, peft_folder(tmp_path / "adapter", tensors)) == 1
    torch.testing.assert_close(pipeline.transformer.get_submodule(name).weight, before + 4 * B @ A)


# --- LyCORIS ----------------------------------------------------------------------------------------------------------------

Q, C = "lora_unet_" + TO_Q.replace(".", "_"), "lora_unet_" + CONV.replace(".", "_")


def test_locon_with_tucker_decomposition(sd_folder, tmp_path):
    down, mid, up = normal(3, 16, 1, 1), normal(3, 3, 3, 3), normal(32, 3, 1, 1)
    tensors = {
        f"{C}.lora_down.weight": down,
        f"{C}.lora_mid.weight": mid,
        f"{C}.lora_up.weight": up,
        f"{C}.alpha": torch.tensor(6.0),
    }
    save_file(tensors, tmp_path / "locon.safetensors")
    expected = 2 * torch.einsum("oi,ijkl,jc->ockl", up[..., 0, 0], mid, down[..., 0, 0])
    check_changes(sd_folder, tmp_path / "locon.safetensors", {f"unet.{CONV}.weight": expected})


def test_loha(sd_folder, tmp_path):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a, b, c, d = normal(32, 2), normal(2, 32), normal(32, 2, seed=1), normal(2, 32, seed=1)
    e, f, g, h = normal(32, 2), normal(2, 144), normal(32, 2, seed=1), normal(2, 144, seed=1)  # flattened, as LyCORIS does
    tensors = {f"{Q}.alpha": torch.tensor(1.0), f"{C}.alpha": torch.tensor(2.0)}
    tensors |= {f"{Q}.{name}": tensor for name, tensor in zip(names, (a, b, c, d), strict=True)}
    tensors |= {f"{C}.{name}": tensor for name, tensor in zip(names, (e, f, g, h), strict=True)}
    save_file(tensors, tmp_path / "loha.safetensors")
    expected = {f"unet.{TO_Q}.weight": 0.5 * (a @ b) * (c @ d), f"unet.{CONV}.weight": ((e @ f) * (g @ h)).view(32, 16, 3, 3)}
    check_changes(sd_folder, tmp_path / "loha.safetensors", expected, 0.5)


def test_lokr(sd_folder, tmp_path):
    """Without a scale where both factors are whole, by ``alpha / rank`` otherwise."""
    w1, w2, a, b = normal(4, 4), normal(8, 8), normal(8, 2), normal(2, 8)
    for factors, scale, second in (({"lokr_w2": w2}, 1.0, w2), ({"lokr_w2_a": a, "lokr_w2_b": b}, 3.0, a @ b)):
        tensors = {f"{Q}.lokr_w1": w1, f"{Q}.alpha": torch.tensor(6.0)} | {f"{Q}.{k}": v for k, v in factors.items()}
        save_file(tensors, tmp_path / "lokr.safetensors")
        check_changes(sd_folder, tmp_path / "lokr.safetensors", {f"unet.{TO_Q}.weight": scale * torch.kron(w1, second)})


@pytest.mark.parametrize("side", ["out", "in"])
def test_dora(side, sd_folder, tmp_path):
    """``m (W + D) / |W + D|``: PEFT and LyCORIS take a norm for each output, older LyCORIS files for each input."""
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    kohya = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
    tensors, D = lora(kohya, 32, 128, alpha=2.0)
    m = 1 + normal(32, 1).abs() if side == "out" else 1 + normal(1, 128).abs()
    save_file(tensors | {f"{kohya}.dora_scale": m}, tmp_path / "dora.safetensors")

    def change(W):
        return m * (W + D) / (W + D).norm(dim=1 if side == "out" else 0, keepdim=True) - W

    for scale in (1.0, 0.5):
        check_changes(sd_folder, tmp_path / "dora.safetensors", {f"{name}.weight": change}, scale)


# --- files that cannot be applied ------------------------------------------------------------------------------------------


def error_of(folder, tensors, tmp_path, name="bad.safetensors"):
    """Return the error's text. Check that no weight has changed."""
    pipeline = load_pipeline(folder)
    before = weights(pipeline)
    save_file(tensors, tmp_path / name)
    with pytest.raises(WadiError) as error:
        apply_lora(pipeline, tmp_path / name)
    assert all(torch.equal(value, before[key]) for key, value in weights(pipeline).items())
    return str(error.value)


@pytest.mark.parametrize("shape", [(), (32,), (0, 32)])
@pytest.mark.parametrize("side", ["lora_down", "lora_up"])
def test_tensors_that_are_not_matrices(shape, side, sd_folder, tmp_path):
    tensors, _ = lora(Q)
    message = error_of(sd_folder, tensors | {f"{Q}.{side}.weight": torch.ones(shape)}, tmp_path)
    assert f"{Q}.{side}.weight" in message
    assert str(shape) in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["lora_up.weight", "alpha"])
def test_values_that_are_not_finite(value, which, sd_folder, tmp_path):
    tensors, _ = lora(Q)
    tensors[f"{Q}.{which}"] = torch.full_like(tensors[f"{Q}.{which}"], value)
    assert f"{Q}.{which}" in error_of(sd_folder, tensors, tmp_path)


def test_a_layer_with_one_of_two_matrices(sd_folder, tmp_path):
    tensors, _ = lora(Q)
    del tensors[f"{Q}.lora_up.weight"]
    assert Q in error_of(sd_folder, tensors, tmp_path)


def test_two_ranks_in_one_layer_and_an_alpha_of_two_numbers(sd_folder, tmp_path):
    tensors, _ = lora(Q)
    assert Q in error_of(sd_folder, tensors | {f"{Q}.lora_up.weight": torch.ones(32, 3)}, tmp_path)
    assert f"{Q}.alpha" in error_of(sd_folder, tensors | {f"{Q}.alpha": torch.ones(2)}, tmp_path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{Q}.oft_diag", "OFT"), (f"{Q}.oft_blocks", "OFT"), (f"{Q}.diff", "differences"), (f"{Q}.on_input", "(IA)^3"),
        (f"{Q}.a1.weight", "GLoRA"), ("emb_params", "--token"), ("image_proj.proj.weight", "--control"),
        ("model.diffusion_model.input_blocks.0.0.weight", "checkpoint"),
        ("controlnet_cond_embedding.conv_in.weight", "--control"),
        (f"base_model.model.{TO_Q}.lorad_A", "folder"), ("something.else", "something.else"),
        ("bundle_emb.cat.string_to_param.*", "textual inversions"), (f"{Q}.w_norm", "normalisation"),
    ],
)  # fmt: skip
def test_other_formats_are_named(key, kind, sd_folder, tmp_path):
    tensors, _ = lora(Q)
    for more in ({}, tensors):
        assert kind in error_of(sd_folder, {**more, key: torch.ones(2, 2)}, tmp_path)


def test_keys_of_a_missing_layer_are_named(sd_folder, tmp_path):
    tensors, _ = lora(Q)
    other, _ = lora("lora_te_text_model_encoder_layers_7_self_attn_q_proj")
    message = error_of(sd_folder, tensors | other, tmp_path)
    assert "lora_te_text_model_encoder_layers_7" in message
    assert "3 keys" in message


def test_folders_that_contain_something_else(sd_folder, tmp_path):
    pipeline = load_pipeline(sd_folder)
    tensors, _ = lora(f"base_model.model.{TO_Q}", alpha=None, down="lora_A", up="lora_B")
    for number, (config, word) in enumerate(
        [({"peft_type": "OFT"}, "OFT"), ({"peft_type": None}, "None"), ({"lora_alpha": "x" * 500}, "lora_alpha"),
         ({"lora_alpha": float("nan")}, "lora_alpha"), ({"alpha_pattern": {"(a+)+$": 2}}, "(a+)+")]
    ):  # fmt: skip
        with raises_naming(word):
            apply_lora(pipeline, peft_folder(tmp_path / str(number), tensors, **config))
    broken = peft_folder(tmp_path / "broken", tensors)
    (broken / "adapter_config.json").write_text("[1, 2")
    with raises_naming("adapter_config.json"):
        apply_lora(pipeline, broken)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04")
    with raises_naming("adapter_model.bin"):
        apply_lora(pipeline, pickled)
