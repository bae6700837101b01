"""More steps: one step is the student's own, times are evenly spaced from t*, and each image has noise of its own seed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from onestep import FAMILIES, FLOWS, network_calls, students
from PIL import Image

import tiny
from backbones import small_pipelines
from raising import raises_naming
from wadi.backbones import from_pipeline
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.extras.steps import MOST, schedule
from wadi.pipelines.generate import Sampling, generate_images


@pytest.fixture(scope="module")
def student_of(tmp_path_factory):
    return students(tmp_path_factory)


def pixels(picture):
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [2, 4])
def test_times_are_evenly_spaced_from_the_students_own(student_of, name, steps):
    pipeline = student_of(name)
    new = schedule(pipeline.scheduler, steps)
    pipeline.scheduler = new.scheduler
    with network_calls(pipeline) as calls:
        generate_images(pipeline, ["red"], [0], Sampling(call=new.call))
    assert [t for t, _ in calls] == pytest.approx([800 * (1 - i / steps) for i in range(steps)], abs=1.01)
    assert new.sigma == pytest.approx(0.8 if name in FLOWS else (1 - new.alpha**2) ** 0.5)


def test_the_input_is_not_mixed_into_the_prediction(student_of):
    """Consistency models mix in more of it at earlier times; the output of a student is its prediction at every time."""
    scheduler = schedule(student_of("sd1").scheduler, 2, strength=0.005).scheduler
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(4)
    assert (float(skip), float(out)) == pytest.approx((0, 1), abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_is_the_student(student_of, name):
    pipeline = student_of(name)
    own = generate_images(pipeline, ["red"], [7]).images[0]
    new = schedule(pipeline.scheduler, 1)
    pipeline.scheduler = new.scheduler
    again = generate_images(pipeline, ["red"], [7], Sampling(call=new.call)).images[0]
    assert np.abs(pixels(own) - pixels(again)).max() <= 1


# flux2-klein's pipeline returns "latent" as the autoencoder's own
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux2-klein"])
def test_the_second_input_is_the_first_prediction_with_new_noise(student_of, name):
    """``alpha x0 + sigma eps`` with the second noise of the picture's own seed."""
    pipeline = student_of(name)
    backbone, new = from_pipeline(pipeline), schedule(pipeline.scheduler, 2)
    call = {"num_inference_steps": 1, "output_type": "latent", **backbone.call}
    with network_calls(pipeline) as calls:
        x0 = pipeline(prompt=["red"], generator=[torch.Generator().manual_seed(3)], **call).images
        pipeline.scheduler = new.scheduler
        generate_images(pipeline, ["red"], [3], Sampling(call=new.call))
    (_, first), (_, z), (_, x_t) = calls
    assert torch.equal(first, z)
    t = torch.tensor([400])
    alpha, sigma = float(backbone.process.alpha(t)), float(backbone.process.sigma(t))
    generator = torch.Generator().manual_seed(3)
    torch.randn((1, *backbone.latent_shape), generator=generator)  # the first step's noise
    noise = torch.randn(z.shape, generator=generator)
    assert torch.allclose(x_t, alpha * x0 + sigma * noise, atol=1e-3 * float(x0.abs().max()))


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_an_image_depends_on_its_own_seed_alone(student_of, name):
    pipeline = student_of(name)
    new = schedule(pipeline.scheduler, 3)
    pipeline.scheduler = new.scheduler
    together = generate_images(pipeline, ["red", "red", "blue"], [5, 6, 7], Sampling(call=new.call)).images
    torch.manual_seed(99)  # the global generator does not matter
    alone = generate_images(pipeline, ["red"], [6], Sampling(call=new.call)).images[0]
    assert np.abs(pixels(together[1]) - pixels(alone)).max() <= 1
    assert (pixels(together[0]) != pixels(together[1])).any()
    assert "step" not in vars(pipeline.scheduler)


def test_each_number_of_steps_gives_another_image(student_of):
    pipeline = student_of("sd2")
    own, pictures = pipeline.scheduler, []
    for steps in (1, 2, 4, 8):
        new = schedule(own, steps)
        pipeline.scheduler = new.scheduler
        with network_calls(pipeline) as calls:
            pictures.append(pixels(generate_images(pipeline, ["red"], [1], Sampling(call=new.call)).images[0]))
        assert len(calls) == steps
    assert all((a != b).any() for a, b in pairwise(pictures))


def test_the_schedule_saves_and_loads_with_the_pipeline(student_of, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = student_of("sd1")
    new = schedule(pipeline.scheduler, 4)
    pipeline.scheduler = new.scheduler
    pipeline.save_pretrained(tmp_path / "four")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "four")
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    picture = loaded("red", num_inference_steps=4, guidance_scale=0.0, generator=generator).images[0]
    assert (
        np.abs(pixels(picture) - pixels(generate_images(pipeline, ["red"], [2], Sampling(call=new.call)).images[0])).max() <= 1
    )


@pytest.mark.parametrize("steps", [0, -1, MOST + 1])
def test_steps_out_of_range(student_of, steps):
    with raises_naming(f"steps is {steps}"):
        schedule(student_of("sd1").scheduler, steps)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_strengths_out_of_range(student_of, strength):
    with raises_naming(f"strength is {strength}"):
        schedule(student_of("sd1").scheduler, 1, strength)


def test_more_steps_than_timesteps(student_of):
    with raises_naming("20 steps", "timestep 8"):
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
    """LCM's own code converts predictions to x0: it must do so as the process does."""
    for kind in ("epsilon", "v_prediction", "sample"):
        pipeline = small_pipelines.readied(tiny.stable_diffusion(tmp_path / kind, kind))
        pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 800)
        process, new = from_pipeline(pipeline).process, schedule(pipeline.scheduler, 2)
        new.scheduler.set_timesteps(2)
        z, prediction = torch.randn(2, 1, 4, 8, 8)
        denoised = new.scheduler.step(prediction, new.scheduler.timesteps[0], z, return_dict=False)[1]
        assert torch.allclose(denoised, process.x0(prediction, z, torch.tensor([800])), atol=1e-5)
