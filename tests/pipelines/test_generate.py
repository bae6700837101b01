"""One-step images: a plain diffusers call, the same for the same seed whatever stands beside it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig
from wadi.pipelines.generate import compare, draw, file_name, generate, load, teacher_of
from wadi.sampling import noise, one_step

PLAIN = {"num_inference_steps": 1, "guidance_scale": 0.0}


def pixels(picture):
    return np.asarray(picture).astype(int)


def same_picture(one, other, off=1):
    """Equal up to the rounding of a pixel."""
    return pixels(one).shape == pixels(other).shape and np.abs(pixels(one) - pixels(other)).max() <= off


def student_at(timestep, teacher, folder):
    """An adapter folder of a student with angles of a tenth, asked at ``timestep``."""
    network = load_pipeline(teacher).unet
    roles.attach(network, "student", LoRaDConfig(r=4, target_modules=r".*(to_q|to_k|to_v|ff\.net\.2)"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters(network, "student").values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    roles.save(network, "student", folder, extra={"timestep": timestep, "teacher": str(teacher)})
    return folder


@pytest.fixture(
    scope="module", params=[("sd_folder", 800), ("sd_folder", 999), ("sd_v_folder", 800), ("sd_v_folder", 999)], ids=str
)
def student(request, tmp_path_factory):
    """``(adapter folder, teacher folder, timestep)``."""
    name, timestep = request.param
    teacher = request.getfixturevalue(name)
    return student_at(timestep, teacher, tmp_path_factory.mktemp("adapter") / "student"), teacher, timestep


@pytest.fixture(scope="module")
def pipeline(finished_run):
    return load(finished_run)


@torch.no_grad()
def test_a_plain_call_is_the_students_step(student):
    """What training calls the student's image, drawn by diffusers from the same seed."""
    folder, teacher, timestep = student
    backbone = from_pipeline(load_pipeline(teacher))
    roles.load(backbone.network, folder, "student")
    with roles.active(backbone.network, "student"):
        x0 = one_step(backbone, backbone.encode(["red apple"]), noise(backbone.latent_shape, [7]), timestep)
    with roles.active(backbone.network, None):
        plain_x0 = one_step(backbone, backbone.encode(["red apple"]), noise(backbone.latent_shape, [7]), timestep)
    pipeline = load(adapter=folder)
    seed = torch.Generator().manual_seed(7)
    latents = pipeline("red apple", generator=seed, output_type="latent", **PLAIN).images
    torch.testing.assert_close(latents, x0, rtol=1e-3, atol=1e-3)
    assert (latents - plain_x0).abs().max() > 0.05  # and not the teacher's
    image = pipeline("red apple", generator=seed.manual_seed(7), output_type="pt", **PLAIN).images
    torch.testing.assert_close(image, backbone.decode(x0), rtol=1e-3, atol=1e-3)


def test_the_pipeline_is_an_ordinary_one(pipeline):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    assert type(pipeline) is StableDiffusionPipeline
    assert type(pipeline.scheduler) is DDIMScheduler
    assert not any("lorad" in key for key in pipeline.unet.state_dict())
    assert not hasattr(pipeline.unet, "peft_config")


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline):
    prompts, seeds = ["red apple", "blue car", "green tree", "red apple", ""], [3, 4, 5, 6, 2**63 - 1]
    alone = [draw(pipeline, [prompt], [seed]).pictures[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    for batch in (2, 5):
        together = draw(pipeline, prompts, seeds, batch=batch).pictures
        assert all(same_picture(*pair) for pair in zip(alone, together, strict=True))
    assert not same_picture(alone[0], alone[3], off=8)  # another seed is another image
    again = draw(pipeline, prompts[:1], seeds[:1]).pictures[0]
    assert same_picture(again, alone[0], off=0)


def test_a_run_an_adapter_and_a_teacher_of_ones_own(finished_run, sd_folder, pipeline, tmp_path):
    (wanted,) = draw(pipeline, ["red apple"], [1]).pictures
    moved = shutil.copytree(sd_folder, tmp_path / "teacher")
    for loaded in (
        load(adapter=finished_run / "student"),
        load(adapter=finished_run / "student", teacher=moved),
        load(finished_run, teacher=moved),
    ):
        assert same_picture(draw(loaded, ["red apple"], [1]).pictures[0], wanted, off=0)


def test_an_interrupted_runs_student_is_there_too(finished_run, tmp_path):
    """Only config and student are needed."""
    (tmp_path / "run").mkdir()
    shutil.copy(finished_run / "config.yaml", tmp_path / "run")
    with pytest.raises(WadiError, match="saved no student"):
        load(tmp_path / "run")
    shutil.copytree(finished_run / "student", tmp_path / "run" / "student")
    load(tmp_path / "run")


@pytest.mark.parametrize(("now", "earlier"), [("clip: 1.0", "clip: .inf"), ("  weight: 0.0", "  weight: 0.5")])
def test_an_earlier_run_with_settings_that_are_refused_today_generates(finished_run, tmp_path, now, earlier):
    run, settings = tmp_path / "run", (finished_run / "config.yaml").read_text()
    shutil.copytree(finished_run, run)
    assert settings.count(now) == 1
    (run / "config.yaml").write_text(settings.replace(now, earlier))
    assert same_picture(
        draw(load(run), ["red apple"], [1]).pictures[0], draw(load(finished_run), ["red apple"], [1]).pictures[0]
    )


def test_a_run_whose_config_names_no_teacher_needs_one(finished_run, sd_folder, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "config.yaml").write_text("steps: 3")
    with pytest.raises(WadiError, match=r"config\.yaml.*--teacher"):
        load(run)
    load(run, teacher=sd_folder)


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "wadi", name
sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(int(sys.argv[3]))
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("red apple", num_inference_steps=1, guidance_scale=0.0, generator=torch.Generator().manual_seed(7)).images[0]
image.save(sys.argv[2])
assert "wadi" not in sys.modules
"""


def test_an_export_needs_nothing_of_ours(finished_run, pipeline, tmp_path, capsys):
    from wadi.cli.main import main

    assert main(["export", "--run", str(finished_run), "--out", str(tmp_path / "export")]) == 0
    command = [sys.executable, "-c", ALONE, str(tmp_path / "export"), str(tmp_path / "apple.png"), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wanted,) = draw(pipeline, ["red apple"], [7]).pictures
    assert same_picture(Image.open(tmp_path / "apple.png"), wanted)
    # and it is a run to draw from here as well
    assert same_picture(draw(load(tmp_path / "export"), ["red apple"], [7]).pictures[0], wanted)
    assert main(["export", "--run", str(finished_run), "--out", str(tmp_path / "export")]) == 2
    assert "exists" in capsys.readouterr().err


def test_one_picture_is_written_where_asked(pipeline, tmp_path):
    made = generate(pipeline, ["red apple"], tmp_path / "deep" / "apple.png", seed=7)
    assert made.paths == [tmp_path / "deep" / "apple.png"]
    assert made.ms_per_image > 0
    assert same_picture(Image.open(made.paths[0]), draw(pipeline, ["red apple"], [7]).pictures[0], off=0)


def test_several_pictures_are_a_grid_and_each_its_file(pipeline, tmp_path):
    paths = generate(pipeline, ["red apple"], tmp_path / "apple.png", seed=7, count=3, batch=2).paths
    assert [path.name for path in paths] == ["apple-7.png", "apple-8.png", "apple-9.png"]
    width, height = Image.open(paths[0]).size
    grid = Image.open(tmp_path / "apple.png").size
    assert grid[0] > 3 * width
    assert grid[1] > height
    assert len(list(tmp_path.iterdir())) == 4


def test_a_prompts_file_makes_a_folder(pipeline, tmp_path):
    prompts = ["Red Apple!", "../../etc/passwd", "日本", "x" * 300]
    paths = generate(pipeline, prompts, tmp_path / "out", seed=5, count=2, batch=3, folder=True).paths
    names = [path.name for path in paths]
    assert names[:5] == [
        "00000-red-apple-5.png", "00001-red-apple-6.png", "00002-etc-passwd-7.png", "00003-etc-passwd-8.png",
        "00004-prompt-9.png",
    ]  # fmt: skip
    assert {path.parent for path in paths} == {tmp_path / "out"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "images.jsonl"])
    assert all(len(name) < 100 for name in names)
    assert len(set(names)) == 8
    assert file_name(3, "a", 0) == "00003-a-0.png"


@pytest.mark.parametrize(
    "bad", [{"count": 0}, {"count": -2}, {"seed": -1}, {"seed": 2**63}, {"seed": 2**63 - 1, "count": 2}, {"batch": 0}]
)
def test_numbers_out_of_range_write_nothing(bad, pipeline, tmp_path):
    with pytest.raises(WadiError, match=r"count|Seeds|batch"):
        generate(pipeline, ["red apple"], tmp_path / "apple.png", **bad)
    with pytest.raises(WadiError):
        generate(pipeline, [], tmp_path / "apple.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file(pipeline, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(WadiError, match="Cannot write"):
        generate(pipeline, ["red apple"], tmp_path / "taken" / "apple.png")
    assert (tmp_path / "taken").read_text() == "mine"


def test_compare_puts_the_teacher_above(finished_run, pipeline):
    teacher = teacher_of(finished_run)
    assert not any("lorad" in key for key in teacher.unet.state_dict())
    picture, slow, fast = compare(pipeline, teacher, ["red apple", "blue car"], [1, 2], 3, 2.0)
    assert slow > 0
    assert fast > 0
    assert picture.size[0] > 2 * 16
    assert picture.size[1] > 2 * 16


# --- what does not fit together -----------------------------------------------------------------------------------------------


def test_folders_that_are_not_what_they_should_be(finished_run, sd_folder, tmp_path):
    with pytest.raises(WadiError, match="both a run and an adapter"):
        load(finished_run, adapter=finished_run / "student")
    with pytest.raises(WadiError, match="is no run"):
        load(tmp_path)
    with pytest.raises(WadiError, match="no adapter folder"):
        load(adapter=tmp_path)
    with pytest.raises(WadiError, match="does not exist"):
        load(adapter=finished_run / "student", teacher=tmp_path / "nowhere")
    with pytest.raises(WadiError, match=r"model_index\.json"):
        load(adapter=finished_run / "student", teacher=tmp_path)


@pytest.mark.parametrize("about", [None, "{", "[]", "{}", '{"timestep": "800"}', '{"timestep": 5000}', '{"timestep": -3}'])
def test_an_adapter_that_does_not_say_its_timestep(about, finished_run, sd_folder, tmp_path):
    """Guessing one would draw a wrong image without a word."""
    folder = shutil.copytree(finished_run / "student", tmp_path / "student")
    (folder / "wadi.json").unlink()
    if about is not None:
        (folder / "wadi.json").write_text(about)
    with pytest.raises(WadiError, match="timestep"):
        load(adapter=folder, teacher=sd_folder)


def test_an_adapter_of_another_architecture(finished_run, tmp_path):
    import tiny

    other = tmp_path / "other"
    tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 16)).save_pretrained(other)
    with pytest.raises(WadiError, match="lorad_"):
        load(finished_run, teacher=other)


def test_the_timestep_travels_with_the_adapter(finished_run):
    assert json.loads((finished_run / "student" / "wadi.json").read_text())["timestep"] == 800
    assert load(finished_run).scheduler.config.num_train_timesteps == 801
