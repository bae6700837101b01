"""Loading a student gives an ordinary diffusers pipeline, and says what is missing otherwise."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from students import one_image, same_image, save_student

import tiny
from processes import run_without_wadi
from raising import raises_naming
from wadi import roles
from wadi.analysis.sources import open_teacher
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.distill.loop import distill
from wadi.errors import WadiError
from wadi.pipelines.hybrid import load_any_student, load_hybrid
from wadi.pipelines.load import is_export, load, load_teacher_pipeline
from wadi.sampling import noise, one_step

PLAIN = {"num_inference_steps": 1, "guidance_scale": 0.0}


@pytest.fixture(
    scope="module", params=[("sd_folder", 800), ("sd_folder", 999), ("sd_v_folder", 800), ("sd_v_folder", 999)], ids=str
)
def student(request, tmp_path_factory):
    """``(adapter folder, teacher folder, timestep)``."""
    name, timestep = request.param
    teacher = request.getfixturevalue(name)
    return save_student(timestep, teacher, tmp_path_factory.mktemp("adapter") / "student"), teacher, timestep


@torch.no_grad()
def test_a_plain_call_is_the_one_step_of_training(student):
    folder, teacher, timestep = student
    backbone = from_pipeline(load_pipeline(teacher))
    roles.load(backbone.network, folder, "student")
    with roles.active(backbone.network, "student"):
        x0 = one_step(backbone, backbone.encode(["red apple"]), noise(backbone.latent_shape, [7]), timestep)
    with roles.active(backbone.network, None):
        teacher_x0 = one_step(backbone, backbone.encode(["red apple"]), noise(backbone.latent_shape, [7]), timestep)
    pipeline = load(adapter=folder)
    seed = torch.Generator().manual_seed(7)
    latents = pipeline("red apple", generator=seed, output_type="latent", **PLAIN).images
    torch.testing.assert_close(latents, x0, rtol=1e-3, atol=1e-3)
    assert (latents - teacher_x0).abs().max() > 0.05
    image = pipeline("red apple", generator=seed.manual_seed(7), output_type="pt", **PLAIN).images
    torch.testing.assert_close(image, backbone.decode(x0), rtol=1e-3, atol=1e-3)


def test_the_pipeline_is_an_ordinary_one(pipeline):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    assert type(pipeline) is StableDiffusionPipeline
    assert type(pipeline.scheduler) is DDIMScheduler
    assert not any("lorad" in key for key in pipeline.unet.state_dict())
    assert not hasattr(pipeline.unet, "peft_config")


def test_run_adapter_and_a_moved_teacher_give_the_same_image(finished_run, sd_folder, pipeline, tmp_path):
    expected = one_image(pipeline)
    moved = shutil.copytree(sd_folder, tmp_path / "teacher")
    for loaded in (
        load(adapter=finished_run / "student"),
        load(adapter=finished_run / "student", teacher=moved),
        load(finished_run, teacher=moved),
        load_any_student(str(sd_folder), str(finished_run)),
    ):
        assert same_image(one_image(loaded), expected, off=0)


def test_a_teacher_that_changed_after_the_training_is_named(sd_folder, prompts_path, tmp_path):
    teacher = shutil.copytree(sd_folder, tmp_path / "teacher")
    run = distill(tiny.settings(teacher, prompts_path, tmp_path / "run", steps=1))
    load(run)
    weights = next((teacher / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    tensors[last].flatten()[-1] += 1  # one value of the last tensor
    save_file(tensors, weights, metadata={"format": "pt"})
    with raises_naming(teacher, run / "student", "--teacher"):
        load(run)
    load(run, teacher=teacher)


def test_an_interrupted_run_loads_from_its_config_and_student(finished_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / "config.yaml", run)
    with pytest.raises(WadiError, match=str(run)):
        load(run)
    shutil.copytree(finished_run / "student", run / "student")
    load(run)


@pytest.mark.parametrize(("now", "earlier"), [("clip: 1.0", "clip: .inf"), ("  weight: 0.0", "  weight: 0.5")])
def test_a_run_with_settings_that_earlier_versions_accepted_loads(finished_run, tmp_path, now, earlier):
    run, settings = tmp_path / "run", (finished_run / "config.yaml").read_text()
    shutil.copytree(finished_run, run)
    assert settings.count(now) == 1
    (run / "config.yaml").write_text(settings.replace(now, earlier))
    assert same_image(one_image(load(run)), one_image(load(finished_run)))


def test_a_run_whose_config_names_no_teacher_needs_one(finished_run, sd_folder, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "config.yaml").write_text("steps: 3")
    with pytest.raises(WadiError) as error:
        load(run)
    assert str(run / "config.yaml") in str(error.value)
    assert "--teacher" in str(error.value)
    load(run, teacher=sd_folder)


IN_PLAIN_DIFFUSERS = """
import sys
import torch
torch.set_num_threads(int(sys.argv[3]))
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("red apple", num_inference_steps=1, guidance_scale=0.0, generator=torch.Generator().manual_seed(7)).images[0]
image.save(sys.argv[2])
assert "wadi" not in sys.modules
"""


def test_an_export_loads_without_this_package(finished_run, pipeline, tmp_path, capsys):
    export, image = tmp_path / "export", tmp_path / "apple.png"
    assert main(["export", "--run", str(finished_run), "--out", str(export)]) == 0
    done = run_without_wadi(IN_PLAIN_DIFFUSERS, str(export), str(image), str(torch.get_num_threads()))
    assert done.returncode == 0, done.stderr
    expected = one_image(pipeline, seed=7)
    assert same_image(Image.open(image), expected)
    assert is_export(export)
    assert same_image(one_image(load(export), seed=7), expected)
    assert main(["export", "--run", str(finished_run), "--out", str(export)]) == 2
    assert str(export) in capsys.readouterr().err


def test_the_teacher_behind_a_student_has_no_adapter(finished_run):
    teacher = load_teacher_pipeline(finished_run)
    assert not any("lorad" in key for key in teacher.unet.state_dict())
    assert not same_image(one_image(teacher), one_image(load(finished_run)), off=8)


def test_a_hybrid_changes_the_chosen_layers_alone(finished_run, sd_folder, pipeline):
    weights, name = open_teacher(str(sd_folder)), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    hybrid, changed = load_hybrid(str(sd_folder), str(finished_run), weights, "direction", name.__eq__)
    assert changed == [name]
    for key, tensor in hybrid.unet.state_dict().items():
        assert torch.equal(tensor, pipeline.unet.state_dict()[key]) == (key != f"{name}.weight")


# --- what does not fit --------------------------------------------------------------------------------------------------------


def test_a_source_that_does_not_fit_is_named(finished_run, sd_folder, tmp_path):
    adapter, weights = finished_run / "student", tmp_path / "weights.safetensors"
    weights.touch()
    other = tmp_path / "other"
    tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 16)).save_pretrained(other)
    for named, call in (
        (adapter, lambda: load(finished_run, adapter=adapter)),
        (tmp_path, lambda: load(tmp_path)),
        (tmp_path, lambda: load(adapter=tmp_path)),
        (tmp_path / "nowhere", lambda: load(adapter=adapter, teacher=tmp_path / "nowhere")),
        (tmp_path, lambda: load(adapter=adapter, teacher=tmp_path)),
        (weights, lambda: load_any_student(str(sd_folder), str(weights))),
        (adapter, lambda: load(finished_run, teacher=other)),
    ):
        with pytest.raises(WadiError, match=str(named)):
            call()


@pytest.mark.parametrize(
    "about",
    [
        None, "{", "[]", "{}", '{"timestep": "800"}', '{"timestep": 5000}', '{"timestep": -3}', '{"timesteps": []}',
        '{"timesteps": [399, 799]}', '{"timesteps": [799, 799]}', '{"timesteps": [799, 0]}', '{"timesteps": [true]}',
        '{"timesteps": [900, 800, 700, 600, 500, 400, 300, 200, 100]}', '{"timesteps": [800, 3]}',
    ],
)  # fmt: skip
def test_an_adapter_without_a_valid_timestep_is_not_loaded(about, finished_run, sd_folder, tmp_path):
    """A guessed timestep would silently give a wrong image."""
    folder = shutil.copytree(finished_run / "student", tmp_path / "student")
    (folder / "wadi.json").unlink()
    if about is not None:
        (folder / "wadi.json").write_text(about)
    with pytest.raises(WadiError, match="timestep"):
        load(adapter=folder, teacher=sd_folder)


def test_the_timestep_travels_with_the_adapter(finished_run):
    assert json.loads((finished_run / "student" / "wadi.json").read_text())["timesteps"] == [800]
    assert load(finished_run).scheduler.config.num_train_timesteps == 801
