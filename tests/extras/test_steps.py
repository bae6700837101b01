"""More steps: one is the student's own, times are trailing, noise is fresh and each picture's own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from onestep import FAMILIES, asked, students
from PIL import Image

import tiny
from backbones import small_pipelines
from wadi.backbones import from_pipeline
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.errors import WadiError
from wadi.extras.steps import MOST, schedule
from wadi.pipelines.generate import Sampling, generate_images


@pytest.fixture(scope="module")
def student_of(tmp_path_factory):
    return students(tmp_path_factory)


def pixels(picture):
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [2, 4])
def test_times_are_trailing_from_the_students_own(student_of, name, steps):
    pipeline = student_of(name)
    found = schedule(pipeline.scheduler, steps)
    pipeline.scheduler = found.scheduler
    with asked(pipeline) as seen:
        generate_images(pipeline, ["red"], [0], Sampling(call=found.call))
    assert [t for t, _ in seen] == pytest.approx([800 * (1 - i / steps) for i in range(steps)], abs=1.01)
    assert found.sigma == pytest.approx(0.8 if name in ("sd3", "flux", "sana") else (1 - found.alpha**2) ** 0.5)


def test_nothing_of_the_input_is_mixed_into_the_answer(student_of):
    """Consistency models mix in more of it the earlier the time; a student's answer is its own at every time."""
    scheduler = schedule(student_of("sd1").scheduler, 2, strength=0.005).scheduler
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(4)
    assert (float(skip), float(out)) == pytest.approx((0, 1), abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_is_the_student(student_of, name):
    pipeline = student_of(name)
    own = generate_images(pipeline, ["red"], [7]).images[0]
    found = schedule(pipeline.scheduler, 1)
    pipeline.scheduler = found.scheduler
    again = generate_images(pipeline, ["red"], [7], Sampling(call=found.call)).images[0]
    assert np.abs(pixels(own) - pixels(again)).max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_input_is_the_first_answer_noised_anew(student_of, name):
    """``alpha x0 + sigma eps`` with the second noise of the picture's own seed."""
    pipeline = student_of(name)
    backbone, found = from_pipeline(pipeline), schedule(pipeline.scheduler, 2)
    call = {"num_inference_steps": 1, "output_type": "latent", **backbone.call}
    with asked(pipeline) as seen:
        x0 = pipeline(prompt=["red"], generator=[torch.Generator().manual_seed(3)], **call).images
        pipeline.scheduler = found.scheduler
        generate_images(pipeline, ["red"], [3], Sampling(call=found.call))
    (_, first), (_, z), (_, x_t) = seen
    assert torch.equal(first, z)
    t = torch.tensor([400])
    alpha, sigma = float(backbone.process.alpha(t)), float(backbone.process.sigma(t))
    generator = torch.Generator().manual_seed(3)
    torch.randn((1, *backbone.latent_shape), generator=generator)  # the start's
    noise = torch.randn(z.shape, generator=generator)
    assert torch.allclose(x_t, alpha * x0 + sigma * noise, atol=1e-3 * float(x0.abs().max()))


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_a_picture_depends_on_its_own_seed_alone(student_of, name):
    pipeline = student_of(name)
    found = schedule(pipeline.scheduler, 3)
    pipeline.scheduler = found.scheduler
    together = generate_images(pipeline, ["red", "red", "blue"], [5, 6, 7], Sampling(call=found.call)).images
    torch.manual_seed(99)  # of no importance
    alone = generate_images(pipeline, ["red"], [6], Sampling(call=found.call)).images[0]
    assert np.abs(pixels(together[1]) - pixels(alone)).max() <= 1
    assert (pixels(together[0]) != pixels(together[1])).any()
    assert "step" not in vars(pipeline.scheduler)


def test_steps_change_the_picture_and_none_is_lost(student_of):
    pipeline = student_of("sd2")
    own, pictures = pipeline.scheduler, []
    for steps in (1, 2, 4, 8):
        found = schedule(own, steps)
        pipeline.scheduler = found.scheduler
        with asked(pipeline) as seen:
            pictures.append(pixels(generate_images(pipeline, ["red"], [1], Sampling(call=found.call)).images[0]))
        assert len(seen) == steps
    assert all((a != b).any() for a, b in pairwise(pictures))


def test_the_schedule_saves_and_loads_with_the_pipeline(student_of, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = student_of("sd1")
    found = schedule(pipeline.scheduler, 4)
    pipeline.scheduler = found.scheduler
    pipeline.save_pretrained(tmp_path / "four")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "four")
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    picture = loaded("red", num_inference_steps=4, guidance_scale=0.0, generator=generator).images[0]
    expected = generate_images(pipeline, ["red"], [2], Sampling(call=found.call)).images[0]
    assert np.abs(pixels(picture) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("steps", [0, -1, MOST + 1])
def test_steps_out_of_range(student_of, steps):
    with pytest.raises(WadiError, match="steps is"):
        schedule(student_of("sd1").scheduler, steps)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_strengths_out_of_range(student_of, strength):
    with pytest.raises(WadiError, match="strength is"):
        schedule(student_of("sd1").scheduler, 1, strength)


def test_more_steps_than_timesteps(student_of):
    with pytest.raises(WadiError, match="raise the strength"):
        schedule(student_of("sd1").scheduler, 20, 0.01)


def test_the_command_line(finished_run, tmp_path, capsys):
    from wadi.cli.main import main

    def picture(name, *flags):
        path = tmp_path / f"{name}.png"
        assert main(["generate", "red apple", "--run", str(finished_run), "--out", str(path), "--device", "cpu", *flags]) == 0
        return pixels(Image.open(path))

    one, four = picture("one"), picture("four", "--steps", "4")
    assert (picture("again", "--steps=1") == one).all()
    assert (one != four).any()
    assert picture("beside", "--compare", "--teacher-steps", "2", "--steps", "2").shape[0] > 32
    assert main(["generate", "apple", "--run", str(finished_run), "--steps", "0", "--out", str(tmp_path / "x.png")]) == 2
    assert "--steps: '0'" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_a_tiny_student_of_every_prediction_type(tmp_path):
    """Predictions are turned into x0 by LCM's own code: it must read them as the process does."""
    for kind in ("epsilon", "v_prediction", "sample"):
        pipeline = small_pipelines.readied(tiny.stable_diffusion(tmp_path / kind, kind))
        pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 800)
        process, found = from_pipeline(pipeline).process, schedule(pipeline.scheduler, 2)
        found.scheduler.set_timesteps(2)
        z, prediction = torch.randn(2, 1, 4, 8, 8)
        denoised = found.scheduler.step(prediction, found.scheduler.timesteps[0], z, return_dict=False)[1]
        assert torch.allclose(denoised, process.x0(prediction, z, torch.tensor([800])), atol=1e-5)
