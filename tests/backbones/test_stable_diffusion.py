"""The Stable Diffusion backbone against the pipeline it was built from."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from raising import raises_naming
from wadi import roles
from wadi.backbones import Condition, from_pipeline, load_pipeline
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.errors import WadiError
from wadi.sampling import many_steps, noise, one_step, predict_guided

PROMPTS = ["red apple", "blue car", ""]


@pytest.fixture(params=["epsilon", "v_prediction"])
def backbone(request):
    return from_pipeline(load_pipeline(request.getfixturevalue("sd_folder" if request.param == "epsilon" else "sd_v_folder")))


def test_its_attributes_come_from_the_pipeline(backbone):
    scheduler = backbone.pipeline.scheduler
    assert backbone.process.prediction == scheduler.config.prediction_type
    assert_close(backbone.process.alpha(torch.tensor([999])) ** 2, scheduler.alphas_cumprod[999:])
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.network is backbone.pipeline.unet


def test_noise_is_each_seeds_own_and_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    seeds = [3, 11, 3]
    theirs = randn_tensor((3, 4, 8, 8), generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    assert torch.equal(noise((4, 8, 8), seeds), theirs)
    assert torch.equal(noise((4, 8, 8), [11])[0], theirs[1])


def test_encode_is_the_pipelines_own(backbone):
    encoded = backbone.encode(PROMPTS).tensors["prompt_embeds"]
    for row, prompt in zip(encoded, PROMPTS, strict=True):
        own, null = backbone.pipeline.encode_prompt(prompt, torch.device("cpu"), 1, do_classifier_free_guidance=True)
        assert_close(row[None], own, rtol=1e-5, atol=1e-6)
        if prompt == "":
            assert_close(row[None], null, rtol=1e-5, atol=1e-6)
    assert not encoded.requires_grad


@torch.no_grad()
def test_conditional_and_null_in_one_batch_are_the_separate_calls(backbone):
    condition, null = backbone.encode(PROMPTS[:2]), backbone.encode([""])
    x_t, t = noise(backbone.latent_shape, [1, 2]), torch.tensor([100, 900])
    alone = [backbone.predict(x_t[i : i + 1], t[i : i + 1], one) for i in range(2) for one in (condition[i : i + 1], null)]
    conditional, unconditional = torch.cat(alone[::2]), torch.cat(alone[1::2])
    both = predict_guided(backbone, x_t, t, condition, null, 3.0)
    assert_close(both, unconditional + 3.0 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert_close(predict_guided(backbone, x_t, t, condition, null, 1.0), conditional, rtol=1e-4, atol=1e-5)


def test_conditions_keep_their_batch_dimension():
    condition = Condition({"a": torch.arange(6.0).reshape(3, 2), "b": torch.arange(3)})
    assert len(condition) == 3
    assert condition[torch.tensor([2, 0])].tensors["b"].tolist() == [2, 0]
    assert len(Condition.cat([condition, condition[:1].expand(4)])) == 7
    assert condition.to(torch.float64).tensors["a"].dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("timestep", [800, 999])
def test_a_step_with_zero_angles_is_one_step_of_the_pipelines_own_scheduler(backbone, timestep):
    """One step at ``t*``, by `sampling.one_step` and by diffusers from the same noise."""
    config = backbone.pipeline.scheduler.config
    condition, z = backbone.encode(PROMPTS[:1]), noise(backbone.latent_shape, [7])
    x0 = one_step(backbone, condition, z, timestep)

    # the teacher's own class over the whole schedule: what it takes the image to be at t*
    own = type(backbone.pipeline.scheduler).from_config(config)
    own.set_timesteps(config.num_train_timesteps)
    prediction = backbone.predict(z, torch.tensor([timestep]), condition)
    assert_close(x0, own.step(prediction, timestep, z).pred_original_sample, rtol=1e-4, atol=1e-4)

    # a scheduler made for the student: one plain step
    scheduler = one_step_scheduler(backbone.pipeline.scheduler, timestep)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [timestep]
    assert scheduler.init_noise_sigma == 1.0
    assert_close(scheduler.step(prediction, scheduler.timesteps[0], z).prev_sample, x0, rtol=1e-4, atol=1e-4)


def test_the_students_scheduler_survives_its_file(backbone, tmp_path):
    from diffusers import DDIMScheduler

    one_step_scheduler(backbone.pipeline.scheduler, 800).save_pretrained(tmp_path)
    again = DDIMScheduler.from_pretrained(tmp_path)
    again.set_timesteps(1)
    assert again.timesteps.tolist() == [800]
    assert_close(again.alphas_cumprod[800], backbone.pipeline.scheduler.alphas_cumprod[800])


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_that_the_schedule_lacks(backbone, timestep):
    with pytest.raises(WadiError, match=str(timestep)):
        one_step_scheduler(backbone.pipeline.scheduler, timestep)


@torch.no_grad()
def test_many_steps_are_the_pipelines_own_with_the_sampler(backbone):
    pipeline = backbone.pipeline
    z = noise(backbone.latent_shape, [3])
    ours = many_steps(backbone, backbone.encode(["red apple"]), backbone.encode([""]), z, 4, 2.5)
    pipeline.scheduler = backbone.sampler()
    theirs = pipeline(
        "red apple", num_inference_steps=4, guidance_scale=2.5, generator=torch.Generator().manual_seed(3), output_type="latent"
    ).images
    assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_decode_gives_images_in_the_unit_range(backbone):
    latents = 5 * noise(backbone.latent_shape, [1, 2])
    images = backbone.decode(latents)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    raw = backbone.pipeline.vae.decode(latents / backbone.pipeline.vae.config.scaling_factor).sample
    assert_close(images, (raw / 2 + 0.5).clamp(0, 1).detach())


def linears_of_the_blocks(network):
    return {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("down_blocks", "mid_block", "up_blocks"))
    }


def test_default_targets_are_the_papers_layers(backbone, tmp_path, prompts_path):
    """Every Linear of the blocks for the student; for the fake model not the projections and not the time embeddings'."""
    import tiny
    from wadi.distill.setup import attach_roles

    linears = linears_of_the_blocks(backbone.network)
    attach_roles(backbone, tiny.settings("x", prompts_path, tmp_path / "run"))
    adapted = {
        role: {name for name, layer in backbone.network.named_modules() if role in getattr(layer, "lorad_A", {})}
        for role in ("student", "fake")
    }
    assert adapted["student"] == linears
    assert adapted["fake"] == {name for name in linears if not name.endswith(("proj_in", "proj_out", "time_emb_proj"))}
    linear = backbone.network.config.use_linear_projection
    assert any(name.endswith("proj_in") for name in linears) == linear


@pytest.mark.parametrize(
    ("config", "layers", "millions"),
    [
        ({"cross_attention_dim": 768, "attention_head_dim": 8}, 182, 83.80),
        ({"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}, 214, 94.43),
    ],
    ids=["sd15", "sd21"],
)
def test_rank_256_on_the_real_architectures_has_the_papers_number_of_parameters(config, layers, millions):
    from types import SimpleNamespace

    from diffusers import DDIMScheduler, UNet2DConditionModel

    from wadi.backbones.sd import StableDiffusion
    from wadi.lorad import LoRaDConfig

    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=64, **config)
    backbone = StableDiffusion(SimpleNamespace(unet=network, scheduler=DDIMScheduler(), vae_scale_factor=8, config={}))
    with torch.device("meta"):
        names = roles.attach(network, "student", LoRaDConfig(r=256, target_modules=backbone.student_targets))
    assert len(names) == layers
    angles = sum(parameter.numel() for parameter in roles.parameters(network, "student").values())
    assert round(angles / 1e6, 2) == millions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_networks_run_in_their_own_dtype(sd_folder, dtype):
    low, high = (from_pipeline(load_pipeline(sd_folder, kind)) for kind in (dtype, torch.float32))
    assert low.network.dtype == low.pipeline.vae.dtype == low.pipeline.text_encoder.dtype == dtype
    z, t = noise(low.latent_shape, [1]), torch.tensor([500])
    predicted = low.predict(z, t, low.encode(["red apple"]))
    assert predicted.dtype == torch.float32
    assert_close(predicted, high.predict(z, t, high.encode(["red apple"])), rtol=0.1, atol=0.1)
    assert low.decode(z).dtype == torch.float32


# --- loading ------------------------------------------------------------------------------------------------------------------


def test_anything_but_a_pipeline_is_a_one_line_error(tmp_path, sd_folder):
    import shutil

    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    broken = tmp_path / "broken"
    shutil.copytree(sd_folder, broken)
    file = next((broken / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    hollow = tmp_path / "hollow"
    shutil.copytree(sd_folder, hollow)
    shutil.rmtree(hollow / "unet")
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "model_index.json").write_text("{")
    for path, named in (
        (tmp_path / "none", "none"),
        (tmp_path / "empty", "model_index.json"),
        (tmp_path / "weights.safetensors", "from_single_file"),
        (broken, "unet"),
        (hollow, "unet"),
        (garbage, "model_index.json"),
        ("owner/name", "hf auth login"),
        ("nonsense", "owner/name"),
    ):
        with raises_naming(path, named):
            load_pipeline(path)


def test_a_pipeline_of_no_family_names_the_families():
    class OddPipeline:
        pass

    with pytest.raises(WadiError, match=r"OddPipeline.*StableDiffusionPipeline"):
        from_pipeline(OddPipeline())
