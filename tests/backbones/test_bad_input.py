"""Errors of a teacher, or of settings that do not fit it, are one line, and come before anything is written."""

from dataclasses import replace

import pytest
import small_pipelines
import torch

from raising import raises_naming
from wadi.backbones import check_not_distilled, from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.diffusion.process import Process
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.distill import setup
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.errors import WadiError
from wadi.sampling import many_steps, noise, student_timestep

CONFIG = DistillConfig(student=StudentConfig(rank=2), fake=FakeConfig(rank=2))


@pytest.fixture
def pipeline(folder_of):
    return load_pipeline(folder_of("sd1"))


def test_a_pipeline_no_family_serves():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    with raises_naming("DDPMPipeline", "FluxPipeline", "add-a-family"):
        from_pipeline(DDPMPipeline(network, DDPMScheduler()))


@pytest.mark.parametrize(
    ("scheduler", "settings", "named"),
    [
        ("DDIMScheduler", {"prediction_type": "score"}, "prediction_type='score'"),
        ("EDMEulerScheduler", {}, "EDMEulerScheduler"),
    ],
)
def test_a_scheduler_nobody_can_read(scheduler, settings, named):
    import diffusers

    with raises_naming(named):
        Process.from_scheduler(getattr(diffusers, scheduler)(**settings))


def test_a_distilled_teacher(pipeline, folder_of):
    from diffusers import LCMScheduler

    original = pipeline.scheduler
    check_not_distilled(pipeline, pipeline.unet)
    pipeline.scheduler = LCMScheduler()
    with raises_naming("LCMScheduler", "--teacher"):
        check_not_distilled(pipeline, pipeline.unet)
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 700)
    with raises_naming("wadi export"):
        check_not_distilled(pipeline, pipeline.unet)
    pipeline.scheduler = original
    pipeline.unet.register_to_config(time_cond_proj_dim=256)
    with raises_naming("time_cond_proj_dim"):
        check_not_distilled(pipeline, pipeline.unet)
    flow = load_pipeline(folder_of("sd3"))
    flow.scheduler = one_step_scheduler(flow.scheduler, 800)
    with raises_naming("wadi export"):
        check_not_distilled(flow, flow.transformer)


def test_a_distilled_teacher_is_refused_by_the_command(folder_of, tmp_path, prompts_file, capsys):
    pipeline = load_pipeline(folder_of("sd1"))
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 700)
    pipeline.save_pretrained(tmp_path / "student")
    out = tmp_path / "run"
    capsys.readouterr()
    arguments = ["--teacher", str(tmp_path / "student"), "--prompts", str(prompts_file), "--out", str(out), "--device", "cpu"]
    assert main(["distill", *arguments]) == 2
    message = capsys.readouterr().err
    assert "--teacher" in message
    assert message.count("\n") == 1
    assert not any(out.rglob("*.safetensors"))


def test_a_teacher_with_an_adapter_attached(tmp_path):
    from peft import LoraConfig

    pipeline = small_pipelines.make("sd1", tmp_path / "parts")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with raises_naming("to_q"):
        setup.attach_roles(from_pipeline(pipeline), CONFIG)
    pipeline.save_pretrained(tmp_path / "saved")
    with raises_naming("unet", "8 tensors", "to_q", "fuse_lora"):
        load_pipeline(tmp_path / "saved")


def test_a_rank_above_what_any_layer_has(pipeline):
    with raises_naming("student.rank", "65", "32"):
        setup.attach_roles(from_pipeline(pipeline), replace(CONFIG, student=StudentConfig(rank=65)))


@pytest.mark.parametrize("pattern", ["nothing_like_it", r".*norm1", r"mid_block\.attentions\.0"])
def test_a_pattern_that_matches_nothing_or_nothing_that_can_be_rotated(pipeline, pattern):
    with pytest.raises(WadiError, match=r"Linear|Conv2d") as caught:
        setup.attach_roles(from_pipeline(pipeline), replace(CONFIG, student=StudentConfig(rank=2, target_modules=pattern)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "resolution", "near"), [("sd1", (17, 16), "16 x 16"), ("sd3", (16, 30), "16 x 32")])
def test_a_resolution_the_model_cannot_draw(folder_of, name, resolution, near):
    with raises_naming(f"{resolution[0]} x {resolution[1]}", near):
        from_pipeline(load_pipeline(folder_of(name)), resolution)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pixart-sigma", "sd3", "sana"])
def test_another_resolution_than_the_models_own(folder_of, name):
    pipeline = load_pipeline(folder_of(name))
    multiple = from_pipeline(pipeline).scale * from_pipeline(pipeline).patch
    backbone = from_pipeline(pipeline, (6 * multiple, 4 * multiple))
    condition = backbone.encode(["red apple"])
    with torch.no_grad():
        images = backbone.decode(backbone.predict(torch.randn(1, *backbone.latent_shape), torch.tensor([500]), condition))
    assert images.shape == (1, 3, 6 * multiple, 4 * multiple)
    assert backbone.call["height"] == 6 * multiple


@pytest.mark.parametrize("command", ["plan", "distill"])
def test_a_hub_model_that_cannot_be_had(command, tmp_path, prompts_file, capsys):
    more = ["--prompts", str(prompts_file), "--out", str(tmp_path / "run")] if command == "distill" else []
    assert main([command, "--teacher", "nobody/has-this-model", *more]) == 2
    message = capsys.readouterr().err
    assert "nobody/has-this-model" in message
    assert "hf auth login" in message
    assert message.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_a_gated_hub_model(monkeypatch):
    import diffusers

    def deny(*args, **kwargs):
        raise OSError("Access to model x/y is restricted.\nIt takes several lines to say so.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", deny)
    with raises_naming("Access to model x/y is restricted", "hf auth login"):
        load_pipeline("x/y")


def test_a_schedule_that_ends_in_pure_noise_needs_an_earlier_timestep(folder_of):
    pipeline = load_pipeline(folder_of("sd1"))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    backbone = from_pipeline(pipeline)
    with raises_naming("999"):
        student_timestep(backbone, None)
    assert student_timestep(backbone, 800) == 800
    condition, z = backbone.encode(["red apple", ""]), noise(backbone.latent_shape, range(1))
    for steps in (1, 3):  # the warm start that such a student needs
        pair = many_steps(backbone, condition[:1], condition[1:], z, steps, 2.0)
        assert pair.isfinite().all()
        assert pair.abs().max() < 1e4


def test_plan_without_anything_to_plan_for(capsys):
    assert main(["plan"]) == 2
    assert "--teacher" in capsys.readouterr().err
    assert main(["plan", "--preset", "sd15", "--processes", "0"]) == 2
    assert "--processes" in capsys.readouterr().err
