"""The ComfyUI workflow of an export generates what the student does, by ComfyUI's own arithmetic."""

import json

import pytest
import small_exports
import torch
from test_single_file import student

from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.exports.comfyui import why_no_workflow, workflow
from wadi.pipelines.load import load

# Inputs of the nodes, from ComfyUI 0.8.0: nodes.py, comfy_extras/nodes_custom_sampler.py, comfy_extras/nodes_model_advanced.py
NODES = {
    "CheckpointLoaderSimple": {"ckpt_name"},
    "LoraLoaderModelOnly": {"model", "lora_name", "strength_model"},
    "ModelSamplingDiscrete": {"model", "sampling", "zsnr"},
    "CLIPTextEncode": {"text", "clip"},
    "BasicGuider": {"model", "conditioning"},
    "RandomNoise": {"noise_seed"},
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "ManualSigmas": {"sigmas"},
    "AddNoise": {"model", "noise", "sigmas", "latent_image"},
    "KSamplerSelect": {"sampler_name"},
    "SamplerCustomAdvanced": {"noise", "guider", "sampler", "sigmas", "latent_image"},
    "VAEDecode": {"samples", "vae"},
    "SaveImage": {"images", "filename_prefix"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "teacher"
            small_exports.MAKERS[name](made[name].parent / "parts").save_pretrained(made[name])
        return made[name]

    return folder


def follow(nodes, name, field):
    """Return the node that an input is linked to."""
    return nodes[nodes[name]["inputs"][field][0]]


def last(nodes, class_type):
    (name,) = (name for name, node in nodes.items() if node["class_type"] == class_type)
    return name


def numbers(node):
    return [float(word) for word in node["inputs"]["sigmas"].split(",")]


def schedule():
    """ComfyUI's sigmas of Stable Diffusion: ``make_beta_schedule('linear')`` of its ModelSamplingDiscrete."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas).sqrt()


def exported(teacher, tmp_path, to, timesteps, *options):
    folder = student(teacher, tmp_path / "adapter")
    (folder / "wadi.json").write_text(json.dumps({"timesteps": timesteps, "teacher": str(teacher)}))
    argv = ["export", "--adapter", str(folder), "--to", to, "--out", str(tmp_path / "out"), "--images", "1"]
    assert main([*argv, *options]) == 0
    return json.loads((tmp_path / "out" / "comfyui" / "workflow.json").read_text()), load(adapter=folder)


@pytest.mark.parametrize(
    ("name", "timesteps", "added"),
    [("sd1", [800], True), ("sd2", [800], True), ("sd1", [999], False), ("sdxl", [699], True), ("sd2", [999, 499], False)],
)
@torch.no_grad()
def test_comfyuis_arithmetic_on_the_workflow_gives_the_students_latents(name, timesteps, added, teacher, tmp_path):
    nodes, pipeline = exported(teacher(name), tmp_path, "single-file", timesteps)
    for node in nodes.values():
        assert node["inputs"].keys() == NODES[node["class_type"]]
        assert all(link[0] in nodes for link in node["inputs"].values() if isinstance(link, list))
    sampler = last(nodes, "SamplerCustomAdvanced")
    levels, sigmas = numbers(follow(nodes, sampler, "sigmas")), schedule()
    found = [int((sigmas.log() - torch.tensor(level).log()).abs().argmin()) for level in levels[:-1]]
    assert found == timesteps
    assert levels[-1] == 0
    latent = follow(nodes, sampler, "latent_image")
    assert (latent["class_type"] == "AddNoise") == added
    # KSAMPLER: the whole of the noise at the end of the schedule, sigma times it elsewhere
    factor = (1 + levels[0] ** 2) ** 0.5
    if added:
        assert latent["inputs"]["noise"] == nodes[sampler]["inputs"]["noise"]  # the same seed
        factor = levels[0] + numbers(nodes[latent["inputs"]["sigmas"][0]])[0]
    sampling = nodes[last(nodes, "ModelSamplingDiscrete")]["inputs"]["sampling"]
    generator = torch.Generator().manual_seed(3)
    backbone = from_pipeline(pipeline)
    noise = [torch.randn((1, *backbone.latent_shape), generator=generator) for _ in timesteps]
    condition, x = backbone.encode(["red apple"]), factor * noise[0]
    for i, t in enumerate(timesteps):
        s = levels[i]
        output = backbone.predict(x / (1 + s**2) ** 0.5, torch.tensor([t]), condition)
        if sampling == "eps":
            x = x - s * output  # EPS.calculate_denoised
        else:
            x = x / (s**2 + 1) - output * s / (s**2 + 1) ** 0.5  # V_PREDICTION.calculate_denoised
        if levels[i + 1] > 0:
            x = x + levels[i + 1] * noise[i + 1]  # sample_lcm
    assert sampling == ("v_prediction" if name == "sd2" else "eps")
    call = {"num_inference_steps": len(timesteps), "output_type": "latent", **backbone.call}
    expected = pipeline("red apple", generator=torch.Generator().manual_seed(3), **call).images
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def test_a_lora_is_loaded_on_the_teachers_checkpoint(teacher, tmp_path):
    nodes, _ = exported(teacher("sd1"), tmp_path, "lora", [800], "--base-name", "owner/some-model")
    loader = nodes[last(nodes, "LoraLoaderModelOnly")]
    assert loader["inputs"]["lora_name"] == "lora.safetensors"
    assert (tmp_path / "out" / "comfyui" / "lora.safetensors").is_file()
    assert nodes[loader["inputs"]["model"][0]]["inputs"] == {"ckpt_name": "some-model.safetensors"}
    assert nodes[last(nodes, "ModelSamplingDiscrete")]["inputs"]["model"] == [last(nodes, "LoraLoaderModelOnly"), 0]
    size = nodes[last(nodes, "EmptyLatentImage")]["inputs"]
    assert (size["width"], size["height"]) == (16, 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "comfyui/workflow.json" in card


def test_models_without_a_workflow_say_why(teacher, tmp_path):
    pipeline = load_pipeline(teacher("sd1"))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.02)
    assert "schedule" in why_no_workflow(from_pipeline(pipeline))
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, beta_end=0.012, prediction_type="sample"
    )
    assert "sample" in why_no_workflow(from_pipeline(pipeline))
    flow = small_exports.small_pipelines.make("sd3", tmp_path / "parts")
    assert "StableDiffusion3Pipeline" in why_no_workflow(from_pipeline(flow))
    nodes = workflow(from_pipeline(load_pipeline(teacher("sd1"))), "a.safetensors", prompt="a 'red' \"apple\"", seed=7)
    assert nodes[last(nodes, "CLIPTextEncode")]["inputs"]["text"] == "a 'red' \"apple\""
    assert nodes[last(nodes, "RandomNoise")]["inputs"]["noise_seed"] == 7
