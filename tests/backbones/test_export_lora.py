"""A student trained as LoRA or DoRA is exported as LoRA files that load without this package and give its images."""

import json

import numpy as np
import pytest
import small_pipelines
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import wadi
from processes import run_without_wadi
from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.convert.lora_files import Lora, check_fits, comfyui_tensors, read_loras
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig
from wadi.roles import methods

LAYERS = r".*(attn\d?\.to_q|attn\d?\.to_out\.0|resnets\.0\.conv1|ff\.net\.2|norm_out\.linear|proj_out|conv_in)"
PATTERNS = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {r"to_out\.0": 5}}
OPTIONS = {"plain": {}, "lora": PATTERNS, "dora": {"use_dora": True}, "rs": {"use_rslora": True, **PATTERNS}}
CASES = [("sd1", "plain"), ("sd1", "lora"), ("sd1", "dora"), ("sdxl", "rs"), ("sd3", "dora"), ("flux", "lora")]
CASES += [("lumina2", "lora"), ("chroma", "plain"), ("qwen-image", "lora"), ("flux2-klein", "lora")]
PROMPT, SEED = "red apple", 3
# The lines of the README, for several folders in one process. The package cannot be imported there.
PLAIN = """
import json, sys
import numpy as np, torch
for case in json.loads(sys.argv[1]):
    for weights, image in case["images"].items():
        names = {"torch": torch, "TEACHER": case["teacher"], "FOLDER": case["folder"], "prompt": case["prompt"]}
        code = case["code"].replace("load_lora_weights(FOLDER)", f"load_lora_weights(FOLDER, weight_name={weights!r})")
        generator = f"generator=torch.Generator().manual_seed({case['seed']})"
        code = code.replace(", num_inference_steps", f", output_type='np', {generator}, num_inference_steps")
        exec(code, names)
        np.save(image, names["image"])
assert "wadi" not in sys.modules
"""


def trained(folder_of, name, options, folder):
    """Write a student whose LoRA is far from zero. Return ``(its backbone with the LoRA attached, adapter folder)``."""
    backbone = from_pipeline(load_pipeline(folder_of(name)), small_pipelines.RESOLUTIONS.get(name))
    roles.attach(backbone.network, "student", LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in roles.parameters(backbone.network, "student").items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in key else 0.3 * noise)
    extra = {"timestep": 800, "teacher": str(folder_of(name)), "resolution": list(backbone.resolution)}
    roles.save(backbone.network, "student", folder, extra=extra)
    return backbone, folder


def generated(backbone):
    pipeline = backbone.pipeline
    generator = torch.Generator().manual_seed(SEED)
    return pipeline(prompt=PROMPT, num_inference_steps=1, output_type="np", generator=generator, **backbone.call).images[0]


def export(adapter, out, *more):
    return main(["export", "--adapter", str(adapter), "--to", "lora", "--out", str(out), *more])


def test_the_files_give_the_students_images_without_this_package(folder_of, tmp_path):
    cases, expected = [], {}
    for name, method in CASES:
        place = tmp_path / f"{name}-{method}"
        backbone, adapter = trained(folder_of, name, OPTIONS[method], place / "adapter")
        assert export(adapter, place / "out") == 0
        backbone.pipeline.scheduler = one_step_scheduler(backbone.pipeline.scheduler, 800)
        with_lora = generated(backbone)
        with roles.active(backbone.network, None):
            assert np.abs(with_lora - generated(backbone)).max() > 0.01  # the LoRA is seen
        files = {"pytorch_lora_weights.safetensors": str(place / "diffusers.npy")}
        if method == "plain":  # diffusers reads kohya's names, but loses alphas that differ between layers
            files["comfyui/lora.safetensors"] = str(place / "kohya.npy")
        assert (place / "out" / "comfyui").exists() == (method != "dora")
        expected |= dict.fromkeys(files.values(), with_lora)
        code = (place / "out" / "README.md").read_text().split("```")[1].removeprefix("python\n")
        teacher = str(folder_of(name))
        cases.append(
            {"teacher": teacher, "folder": str(place / "out"), "code": code, "images": files, "prompt": PROMPT, "seed": SEED}
        )
        text = "".join(file.read_bytes().decode("latin1") for file in (place / "out").rglob("*") if file.is_file())
        assert str(tmp_path) not in text
        assert teacher not in text
    done = run_without_wadi(PLAIN, json.dumps(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    for file, image in expected.items():  # the order of sums may differ
        assert np.abs(np.load(file) - image).max() < 1e-4, file


def test_a_run_with_a_lora_student_becomes_a_file_for_plain_diffusers(folder_of, tmp_path, prompts_path):
    """From `wadi distill` to the image, in two steps."""
    run, out, teacher = tmp_path / "run", tmp_path / "out", str(folder_of("sd1"))
    command = [
        "distill", "--teacher", teacher, "--prompts", str(prompts_path), "--out", str(run), "--student.adapter", "lora",
        "--student.rank", "4", "--student.lr", "0.01", "--student.timesteps", "[800,400]", "--steps", "3", "--batch", "2",
        "--fake.adapter", "dora-frozen", "--fake.rank", "2", "--device", "cpu", "--sample-every", "0", "--sample-seeds", "1",
        "--teacher-steps", "2",
    ]  # fmt: skip
    assert main(command) == 0
    assert main(["export", "--run", str(run), "--to", "lora", "--out", str(out)]) == 0
    pipeline = wadi.load(run)
    generator = torch.Generator().manual_seed(SEED)
    call = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "np"}
    expected = pipeline(PROMPT, generator=generator, **call).images[0]
    plain = load_pipeline(teacher)
    plain.scheduler = pipeline.scheduler
    assert np.abs(plain(PROMPT, generator=generator.manual_seed(SEED), **call).images[0] - expected).max() > 1e-3
    code = (out / "README.md").read_text().split("```")[1].removeprefix("python\n")
    images = {"pytorch_lora_weights.safetensors": str(tmp_path / "image.npy")}
    case = {"teacher": teacher, "folder": str(out), "code": code, "images": images, "prompt": PROMPT, "seed": SEED}
    done = run_without_wadi(PLAIN, json.dumps([case]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.abs(np.load(tmp_path / "image.npy") - expected).max() < 1e-4


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name not in ("lora", "dora", "dora-frozen")])
def test_other_methods_are_approximated_and_at_full_rank_are_the_student(method, folder_of, tmp_path, capsys):
    backbone = from_pipeline(load_pipeline(folder_of("sd1")))
    options = {"oft": {"oft_block_size": 4}, "road": {"group_size": 8}}.get(method, {})
    config = methods.adapter_config(method, "student", 2, options, r".*(attn1\.to_q|ff\.net\.0\.proj)")
    roles.attach(backbone.network, "student", config)
    with torch.no_grad():
        for parameter in roles.parameters(backbone.network, "student").values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    roles.save(backbone.network, "student", tmp_path / "a", extra={"timesteps": [800], "teacher": str(folder_of("sd1"))})
    records = {}
    for rank in (1, 32):
        assert export(tmp_path / "a", tmp_path / str(rank), "--rank", str(rank)) == 0
        records[rank] = json.loads((tmp_path / str(rank) / "export.json").read_text())
    assert records[1]["lost"] > 0.01 > records[32]["lost"]
    outside = records[32]["outside"]
    assert bool(outside) == (method == "road")  # it rotates the bias too, which a LoRA cannot hold
    if not outside:
        assert records[32]["check"]["mean"] < 0.2 * records[32]["check_without_lora"]["mean"]
    tensors = load_file(tmp_path / "32" / "comfyui" / "lora.safetensors")
    base, merged = load_pipeline(folder_of("sd1")).unet.state_dict(), roles.fuse(backbone.network, "student").state_dict()
    changed = [name for name in merged if name not in outside and not torch.equal(merged[name], base[name])]
    assert len(changed) == len(records[32]["losses"])
    for key in changed:
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        assert torch.allclose(base[key] + up @ down * tensors[f"{name}.alpha"] / len(down), merged[key], atol=1e-5)


def test_the_metadata_keeps_alphas_and_ranks(folder_of, tmp_path):
    _, adapter = trained(folder_of, "sd1", OPTIONS["lora"], tmp_path / "adapter")
    assert export(adapter, tmp_path / "out") == 0
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        (stored,) = (json.loads(text) for key, text in file.metadata().items() if key != "format")
    loras = read_loras(adapter)
    assert stored["unet.use_dora"] is False
    assert {lora.rank for lora in loras.values()} == {2, 3}
    assert {layer.split(".")[-2] for layer, lora in loras.items() if lora.alpha == 5} == {"to_out"}


# Keys per layer that ComfyUI looks up: model_lora_keys_unet in comfy/lora.py (``lora_unet_`` and the name in diffusers with
# underscores for U-Nets; ``transformer.`` and the name in diffusers for SD3 and FLUX), then LoRAAdapter.load in
# comfy/weight_adapter/lora.py (``lora_up.weight`` or ``lora_B.weight``) and ``alpha`` in load_lora.
COMFYUI_KEYS = {
    ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"): (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        {"lora_up.weight", "lora_down.weight", "alpha"},
    ),
    ("transformer", "transformer_blocks.0.attn.to_out.0"): (
        "transformer.transformer_blocks.0.attn.to_out.0",
        {"lora_B.weight", "lora_A.weight", "alpha"},
    ),
}


@pytest.mark.parametrize("place", COMFYUI_KEYS)
def test_comfyui_finds_every_tensor(place):
    component, layer = place
    name, endings = COMFYUI_KEYS[place]
    tensors = comfyui_tensors({layer: Lora(torch.ones(2, 5), torch.ones(4, 2), 3.0)}, component)
    assert set(tensors) == {f"{name}.{ending}" for ending in endings}
    assert float(tensors[f"{name}.alpha"]) == 3


def test_comfyuis_arithmetic_gives_the_weights_that_peft_merges(folder_of, tmp_path):
    backbone, adapter = trained(folder_of, "sd1", OPTIONS["rs"], tmp_path / "adapter")
    assert export(adapter, tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / "comfyui" / "lora.safetensors")
    base = load_pipeline(folder_of("sd1")).unet
    merged = roles.fuse(backbone.network, "student").state_dict()
    for layer, lora in read_loras(adapter).items():
        name, weight = f"lora_unet_{layer.replace('.', '_')}", base.get_submodule(layer).weight.detach()
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * tensors[f"{name}.alpha"] / lora.rank
        changed = weight + change
        assert torch.allclose(changed, merged[f"{layer}.weight"], atol=1e-5), layer


def test_other_methods_damage_and_existing_folders_are_errors(folder_of, tmp_path, capsys):
    backbone = from_pipeline(load_pipeline(folder_of("sd1")))
    roles.attach(backbone.network, "student", LoRaDConfig(r=2, target_modules=backbone.student_targets))
    roles.save(backbone.network, "student", tmp_path / "same", extra={"timestep": 800, "teacher": str(folder_of("sd1"))})
    assert export(tmp_path / "same", tmp_path / "out") == 2
    assert "same weights" in capsys.readouterr().err
    _, adapter = trained(folder_of, "sd1", {}, tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    assert export(adapter, tmp_path / "there") == 2
    assert "there" in capsys.readouterr().err
    assert main(["export", "--adapter", str(adapter), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "gguf" in error
    assert "diffusers" in error
    assert "lora" in error
    assert export(adapter, tmp_path / "out", "--teacher", str(folder_of("sdxl"))) == 2
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change in ({"lora_alpha": "much"}, {"init_lora_weights": "pissa"}, {"use_dora": True}, {"alpha_pattern": ["to_q"]}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(WadiError):
            read_loras(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert export(adapter, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_lora_loader_is_an_error(folder_of, tmp_path, capsys):
    _, adapter = trained(folder_of, "pixart-sigma", {}, tmp_path / "adapter")
    assert export(adapter, tmp_path / "out") == 2
    assert "PixArtSigmaPipeline" in capsys.readouterr().err


def test_a_layer_of_another_shape_is_an_error():
    with raises_naming("0", (4, 5)):
        check_fits(torch.nn.Sequential(torch.nn.Linear(5, 4)), {"0": Lora(torch.ones(2, 6), torch.ones(4, 2), 1.0)})
