"""Adapters combine by one formula: angles add, and so do changes of the teacher's weights."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from students import one_image, same_image

import tiny
from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.cli.scaled import split_scale
from wadi.full import FullConfig
from wadi.lorad import LoRaDConfig
from wadi.pipelines.load import load

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import small_pipelines

TARGETS = r".*(to_q|to_k|ff\.net\.2|conv1)"
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
DORA = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=r".*(to_q|to_v)")
CONFIGS = {
    "one": LoRaDConfig(r=4, target_modules=TARGETS),
    "two": LoRaDConfig(r=2, target_modules=r".*(to_q|to_v)"),
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=r".*(to_q|conv1)"),
    "dora": DORA,
    "full": FullConfig(target_modules=r".*(to_q|to_out\.0)"),
    "halves": LoRaDConfig(r=2, target_modules=r".*to_q", pairing="halves"),
}


def adapter(teacher, config, folder, seed=0, about=None, spread=0.4):
    """Write an adapter of random values for the network of ``teacher``, and return its folder."""
    network = from_pipeline(load_pipeline(teacher)).network
    roles.attach(network, "new", config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in roles.parameters(network, "new").items():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    about = {"timesteps": [800], "teacher": str(teacher)} if about is None else about
    roles.save(network, "new", folder, extra=about or None)
    return folder


@pytest.fixture(scope="module")
def adapters(sd_folder, tmp_path_factory):
    """An adapter folder of each of `CONFIGS`, and ``subject``: one without timesteps, as of DreamBooth."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {name: adapter(sd_folder, config, folder / name, seed) for seed, (name, config) in enumerate(CONFIGS.items())}
    made["subject"] = adapter(sd_folder, CONFIGS["two"], folder / "subject", 9, {"instance_prompt": "sks apple"})
    return made


@pytest.fixture(scope="module")
def lora_file(adapters, tmp_path_factory):
    """The matrices of ``lora`` in kohya's format, of which the alpha is 6 and the rank 3."""
    file, tensors = tmp_path_factory.mktemp("lora") / "style.safetensors", {}
    for key, value in load_file(adapters["lora"] / "adapter_model.safetensors").items():
        layer, _, side = key.removeprefix("base_model.model.").partition(".lora_")
        kohya = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{kohya}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = value
        tensors[f"{kohya}.alpha"] = torch.tensor(6.0)
    save_file(tensors, file)
    return file


def weights(pipeline):
    return {name: value.double() for name, value in from_pipeline(pipeline).network.state_dict().items()}


def factors(folder, first, second):
    """``{weight: (first, second)}`` of an adapter file, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(first) + ".weight": (
            tensors[key].double(),
            tensors[key.removesuffix(first) + second].double(),
        )
        for key in tensors
        if key.endswith(first)
    }


def formula(teacher, scaled):
    """``rot(W, sum s theta) + sum s (alpha / r) B A`` in float64, from the files of LoRaD adapters and one LoRA of scale 2."""
    expected = weights(load_pipeline(teacher))
    angles, changes = {}, {}
    for folder, scale in scaled:
        for name, (A, B) in factors(folder, ".lorad_A", ".lorad_B").items():
            angles[name] = angles.get(name, 0) + scale * A @ B
        for name, (A, B) in factors(folder, ".lora_A.weight", ".lora_B.weight").items():
            product = (B.flatten(1) @ A.flatten(1)).view(expected[name].shape)
            changes[name] = changes.get(name, 0) + scale * 2 * product
    for name, theta in angles.items():
        flat = expected[name].flatten(1)
        even, odd = flat[:, 0::2], flat[:, 1::2]
        turned = torch.stack((even * theta.cos() - odd * theta.sin(), even * theta.sin() + odd * theta.cos()), 2)
        expected[name] = turned.flatten(1).view(expected[name].shape)
    return {name: value + changes.get(name, 0) for name, value in expected.items()}


def check_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text)


# --- laws ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaled",
    [
        {"one": 0.7, "two": 0.3},
        {"one": 0.5},
        {"one": 0.7, "two": -1.5, "lora": 0.4},
        {"lora": 0.4, "one": 0.7, "two": -1.5},
        {"lora": 0.3},
        {"one": 1.0, "subject": 0.8},
    ],
    ids=str,
)
def test_the_weights_follow_the_formula(scaled, adapters, sd_folder):
    pipeline = load(adapter={adapters[name]: scale for name, scale in scaled.items()})
    check_equal(weights(pipeline), formula(sd_folder, [(adapters[name], scale) for name, scale in scaled.items()]))
    assert type(pipeline.unet.get_submodule(TO_Q.removesuffix(".weight"))) is torch.nn.Linear
    assert not hasattr(pipeline.unet, "peft_config")
    assert pipeline.scheduler.config.num_train_timesteps == 801


def test_other_methods_add_their_change_of_the_teachers_weights(adapters, sd_folder):
    W = weights(load_pipeline(sd_folder))
    whole = {name: weights(load(adapter=adapters[name])) for name in ("dora", "full", "one")}
    found = weights(load(adapter={str(adapters["dora"]): 0.5, str(adapters["full"]): -0.25, str(adapters["one"]): 1}))
    expected = {
        name: whole["one"][name] + 0.5 * (whole["dora"][name] - W[name]) - 0.25 * (whole["full"][name] - W[name]) for name in W
    }
    check_equal(found, expected)
    assert (whole["dora"][TO_Q] - W[TO_Q]).abs().max() > 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_scale_one_is_the_adapter_and_scale_zero_the_teacher_bit_for_bit(name, adapters, sd_folder):
    check_equal(weights(load(adapter={adapters[name]: 1.0})), weights(load(adapter=adapters[name])), 1e-6)
    check_equal(weights(load(adapter={adapters[name]: 0.0})), weights(load_pipeline(sd_folder)), 0)


def test_half_precision_is_rounded_once(adapters, sd_folder):
    scaled = [(adapters["one"], 0.7), (adapters["two"], 0.3), (adapters["lora"], 0.5)]
    found = load(adapter=dict(scaled), dtype=torch.bfloat16).unet.state_dict()[TO_Q]
    base = load_pipeline(sd_folder, torch.bfloat16).unet.state_dict()[TO_Q].double()
    exact = formula(sd_folder, scaled)[TO_Q]
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).abs().max()
    assert error < 2 * (base - weights(load_pipeline(sd_folder))[TO_Q]).abs().max() + exact.abs().max() / 256


@pytest.mark.parametrize("name", small_pipelines.MAKERS)
def test_every_family_combines_lorad_with_lora_and_a_lora_file(name, tmp_path):
    teacher = tmp_path / "teacher"
    small_pipelines.make(name, tmp_path / "parts").save_pretrained(teacher)
    network = from_pipeline(load_pipeline(teacher)).network
    layers = [layer for layer, _ in network.named_modules() if layer.endswith(("to_q", "to_k"))][:4]
    one = adapter(teacher, LoRaDConfig(r=2, target_modules=layers), tmp_path / "one")
    two = adapter(teacher, LoraConfig(r=2, lora_alpha=4, target_modules=layers), tmp_path / "two", 1)
    found = weights(load(adapter={one: 0.7, two: 0.3}, lora={two: 0.5}))
    expected = formula(teacher, [(one, 0.7), (two, 0.3), (two, 0.5)])
    check_equal(found, expected)
    assert (expected[f"{layers[0]}.weight"] - weights(load_pipeline(teacher))[f"{layers[0]}.weight"]).abs().max() > 0.01


# --- the command --------------------------------------------------------------------------------------------------------------


def generate(*argv):
    return main(["generate", *map(str, argv), "--device", "cpu"])


def test_the_command_gives_the_images_of_python(adapters, lora_file, tmp_path):
    argv = ["red apple", "--seed", 1, "--adapter", f"{adapters['one']}:0.7", "--adapter", f"{adapters['two']}:.3"]
    assert generate(*argv, "--lora", f"{lora_file}:0.4", "--lora", lora_file, "--out", tmp_path / "a.png") == 0
    expected = one_image(load(adapter={adapters["one"]: 0.7, adapters["two"]: 0.3}, lora={lora_file: 1.4}))
    assert same_image(Image.open(tmp_path / "a.png"), expected)
    assert not same_image(one_image(load(adapter={adapters["one"]: 0.7, adapters["two"]: 0.3})), expected)
    earlier = ["--lora", lora_file, "--lora-scale", "0.4", "--lora", lora_file, "--lora-scale", "1"]
    assert generate(*argv, *earlier, "--out", tmp_path / "b.png") == 0
    assert same_image(Image.open(tmp_path / "b.png"), expected)
    assert generate(*argv, "--compare", "--teacher-steps", "2", "--out", tmp_path / "c.png") == 0


def test_a_folder_of_images_knows_the_scales(adapters, lora_file, prompts_path, tmp_path, capsys):
    def run(one, two, lora="0.4", order=1):
        pair = [f"{adapters['one']}:{one}", f"{adapters['two']}:{two}"][::order]
        options = ["--adapter", pair[0], "--adapter", pair[1], "--lora", f"{lora_file}:{lora}"]
        return generate("--prompts", prompts_path, "--out", tmp_path / "out", *options), capsys.readouterr()

    assert run(0.7, 0.3)[0] == 0
    code, (printed, _) = run(0.7, 0.3, order=-1)
    assert (code, "there already" in printed) == (0, True)
    assert run(0.6, 0.3)[0] == run(0.7, 0.2)[0] == run(0.7, 0.3, "0.5")[0] == 2


def test_names_with_a_colon_and_scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b:0.5", "a:1"):
        Path(name).mkdir()
    assert split_scale("adapter", "b:0.5") == ("b:0.5", None)
    assert split_scale("adapter", "b:0.5:0.3") == ("b:0.5", "0.3")
    assert split_scale("adapter", "a:1") == ("a:1", None)  # the folder of this name counts
    assert split_scale("adapter", "a:-0.25") == ("a", "-0.25")
    assert split_scale("lora", r"C:\loras\x.safetensors") == (r"C:\loras\x.safetensors", None)
    assert split_scale("lora", r"C:\loras\x.safetensors:0.8") == (r"C:\loras\x.safetensors", "0.8")
    assert split_scale("lora", "C:/x.safetensors") == ("C:/x.safetensors", None)
    assert split_scale("lora", "nowhere:half") == ("nowhere:half", None)
    assert split_scale("lora", ":0.5") == (":0.5", None)
    for text, scale in (
        ("a:inf", "inf"),
        ("a:nan", "nan"),
        ("a:1e400", "1e400"),
        ("a:5", "5"),
        ("a:half", "half"),
        ("a:", "''"),
    ):
        with raises_naming("--adapter", text, scale):
            split_scale("adapter", text)


# --- bad input ----------------------------------------------------------------------------------------------------------------


def test_options_that_do_not_fit_are_named_before_anything_is_loaded(adapters, lora_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wadi.pipelines.load.load_pipeline", lambda *_, **__: pytest.fail("a pipeline was loaded"))
    one, two, out = adapters["one"], adapters["two"], tmp_path / "x.png"
    for argv, named in (
        (["--adapter", f"{one}:inf"], ("inf", "--adapter")),
        (["--adapter", one, "--adapter", f"{two}:two"], ("'two'", "--adapter")),
        (["--adapter", one, "--adapter", tmp_path / "nowhere:0.3"], ("nowhere",)),
        (["--adapter", f"{one}:0.5", "--adapter", one], ("--adapter", str(one))),
        (["--run", tmp_path, "--adapter", f"{one}:0.5"], ("--run", "--adapter")),
        (["--adapter", one, "--lora", f"{lora_file}:nan"], ("nan", "--lora")),
        (["--adapter", one, "--lora", f"{lora_file}:1", "--lora-scale", "1"], ("--lora-scale", "--lora")),
    ):
        assert generate("red apple", *argv, "--out", out) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert [value for value in named if value not in error] == []
    assert not out.exists()


def with_about(folder, to, **changes):
    shutil.copytree(folder, to)
    about = json.loads((to / "wadi.json").read_text())
    (to / "wadi.json").write_text(json.dumps(about | changes))
    return to


def test_students_that_do_not_fit_each_other_are_named(adapters, sd_folder, tmp_path):
    one, two = adapters["one"], adapters["two"]
    for changes, named in (
        ({"timesteps": [900]}, ("timesteps", "[800]", "[900]")),
        ({"timesteps": [800, 400]}, ("timesteps", "[800, 400]")),
        ({"teacher": "owner/other"}, ("owner/other", sd_folder, "--teacher")),
    ):
        other = with_about(two, tmp_path / str(changes), **changes)
        with raises_naming(one, other, *named):
            load(adapter={one: 0.5, other: 0.5})
    load(adapter={one: 0.5, other: 0.5}, teacher=sd_folder)  # a named teacher is for all of them
    sized = [with_about(two, tmp_path / str(side), resolution=[side, side]) for side in (16, 32)]
    with raises_naming(*sized, "resolution", "[16, 16]", "[32, 32]"):
        load(adapter=dict.fromkeys(sized, 0.5))
    digests = [with_about(two, tmp_path / mark, teacher_digest=64 * mark) for mark in "ab"]
    with raises_naming(*digests, "teacher"):
        load(adapter=dict.fromkeys(digests, 0.5))
    with raises_naming(one, adapters["halves"], "neighbours", "halves"):
        load(adapter={one: 0.5, adapters["halves"]: 0.5})
    with raises_naming(adapters["subject"], "timesteps"):
        load(adapter={adapters["subject"]: 0.5, one: 0.5})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 4.5, "half", None, True])
def test_scales_out_of_range(scale, adapters):
    with raises_naming(adapters["two"], scale):
        load(adapter={adapters["one"]: 1.0, adapters["two"]: scale})


def test_what_is_no_adapter_of_this_teacher_is_named(adapters, sd_folder, tmp_path):
    one, other = adapters["one"], tmp_path / "other"
    tiny.stable_diffusion(tmp_path / "parts", down_block_types=("CrossAttnDownBlock2D",) * 2).save_pretrained(other)
    foreign = adapter(other, CONFIGS["two"], tmp_path / "foreign", about=False)
    with raises_naming(foreign, "down_blocks.0.attentions.0"):
        load(adapter={one: 0.5, foreign: 0.5})
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text('{"peft_type": "LORAD"}')
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04")
    with raises_naming(pickled, "adapter_model.safetensors"):
        load(adapter={one: 0.5, pickled: 0.5})
    with raises_naming("style.ckpt"):
        (tmp_path / "style.ckpt").write_bytes(b"\x80\x04")
        load(adapter=one, lora=tmp_path / "style.ckpt")
    with raises_naming("empty"):
        load(adapter={})


def test_a_students_adapter_is_no_lora(adapters):
    with raises_naming(adapters["two"], "--adapter"):
        load(adapter=adapters["one"], lora=adapters["two"])
