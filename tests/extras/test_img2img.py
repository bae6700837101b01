"""Image to image: the network gets the image with noise of the right time, and a low strength keeps most of the image."""

import numpy as np
import pytest
import torch
from onestep import FAMILIES, network_calls, students
from PIL import Image

from raising import raises_naming
from wadi.backbones import from_pipeline
from wadi.diffusion.schedulers import student_scheduler
from wadi.extras.image_to_image import image_tensor, read_init, start_from
from wadi.extras.steps import schedule, student_schedule
from wadi.pipelines.generate import Sampling, generate_images
from wadi.pipelines.load import load


@pytest.fixture(scope="module")
def student_of(tmp_path_factory):
    return students(tmp_path_factory)


def stripes(width, height, mode="RGB"):
    values = np.zeros((height, width, 3), np.uint8)
    values[:, ::4], values[::4] = (200, 30, 90), (20, 160, 220)
    return Image.fromarray(values).convert(mode)


def redrawn(pipeline, picture, strength, steps=1, seed=5, count=1):
    """Generate ``count`` images from ``picture`` with consecutive seeds."""
    image = image_tensor(picture, from_pipeline(pipeline).resolution)
    new = schedule(pipeline.scheduler, steps, strength)
    pipeline.scheduler = new.scheduler
    begin = start_from(from_pipeline(pipeline), image, new)
    seeds = list(range(seed, seed + count))
    return generate_images(pipeline, ["red"] * count, seeds, Sampling(call=new.call, start=begin)).images


def pixels(picture):
    return np.asarray(picture).astype(int)


# --- the start ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 1), (0.5, 2), (1.0, 1), (0.25, 3)])
def test_the_network_gets_the_image_with_noise_of_its_share_of_the_time(student_of, name, strength, steps):
    pipeline = student_of(name)
    backbone = from_pipeline(pipeline)
    height, width = backbone.resolution
    picture = stripes(width, height)
    with network_calls(pipeline) as calls:
        pictures = redrawn(pipeline, picture, strength, steps)
    assert pictures[0].size == (width, height)
    assert [t for t, _ in calls] == pytest.approx([800 * strength * (1 - i / steps) for i in range(steps)], abs=1.01)
    t = torch.tensor([round(800 * strength)])
    alpha, sigma = float(backbone.process.alpha(t)), float(backbone.process.sigma(t))
    x0 = backbone.encode_images((image_tensor(picture, (height, width)) + 1) / 2)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    x_t = alpha * x0 + sigma * noise
    if name.startswith("flux2"):
        x_t = x_t.flatten(2).transpose(1, 2)
    elif name in ("flux", "chroma", "qwen-image"):
        x_t = pipeline._pack_latents(x_t, *x_t.shape)
    assert torch.allclose(calls[0][1], x_t, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("strength", "rest"), [(1.0, 0), (0.8, 1), (0.5, 2), (0.1, 3)])
def test_a_student_of_several_steps_begins_at_the_nearest_of_its_own_timesteps(student_of, name, strength, rest):
    """The timesteps are those of the student, also where they are not evenly spaced."""
    pipeline = student_of(name)
    backbone = from_pipeline(pipeline)
    flow = backbone.process.alphas is None
    trained = (810, 540, 360, 240) if flow else (799, 607, 399, 207)
    scheduler = student_scheduler(pipeline.scheduler, trained)
    new = student_schedule(scheduler, trained, None, strength)
    pipeline.scheduler = new.scheduler
    picture = stripes(*reversed(backbone.resolution))
    begin = start_from(backbone, image_tensor(picture, backbone.resolution), new)
    with network_calls(pipeline) as calls:
        generate_images(pipeline, ["red"], [5], Sampling(call=new.call, start=begin))
    assert [t for t, _ in calls] == pytest.approx(trained[rest:], abs=0.01)
    t = torch.tensor([trained[rest]])
    assert (new.alpha, new.sigma) == pytest.approx((float(backbone.process.alpha(t)), float(backbone.process.sigma(t))))


def test_a_lower_strength_changes_less(student_of):
    """The network is untrained, so the rest of the image that remains grows as the strength falls."""
    pipeline = student_of("sd1")
    picture = stripes(16, 16)
    kept = image_tensor(picture, (16, 16))
    with torch.no_grad():
        through = (pipeline.vae.decode(pipeline.vae.encode(kept).latent_dist.mode())[0] / 2 + 0.5).clamp(0, 1)
    through = (through[0].permute(1, 2, 0).numpy() * 255).round()
    own, errors = pipeline.scheduler, []
    for strength in (0.02, 0.3, 1.0):
        pipeline.scheduler = own
        errors.append(np.abs(pixels(redrawn(pipeline, picture, strength)[0]) - through).mean())
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_later_steps_use_new_noise_of_each_images_own_seed(student_of, name):
    """The second step uses the second noise of its image's seed: a new generator would repeat the first noise."""
    pipeline = student_of(name)
    backbone, own, picture = from_pipeline(pipeline), pipeline.scheduler, stripes(16, 16)
    with network_calls(pipeline) as calls:
        pictures = redrawn(pipeline, picture, 0.9, steps=2, count=2)
    (_, first), (t, second) = calls
    one = schedule(own, 1, 0.9)
    pipeline.scheduler = one.scheduler
    x0 = pipeline(prompt=["red"] * 2, latents=first, output_type="latent", **backbone.call, **one.call).images
    alpha, sigma = (float(values(torch.tensor([t]))) for values in (backbone.process.alpha, backbone.process.sigma))
    for i, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        torch.randn((1, *backbone.latent_shape), generator=generator)
        noise = torch.randn(first[i].shape, generator=generator)
        assert torch.allclose(second[i], alpha * x0[i] + sigma * noise, atol=1e-3 * float(x0.abs().max()))
    new = schedule(own, 2, 0.9)
    pipeline.scheduler = new.scheduler
    begin = start_from(backbone, image_tensor(picture, (16, 16)), new)
    alone = generate_images(pipeline, ["red"], [6], Sampling(call=new.call, start=begin)).images[0]
    assert np.abs(pixels(alone) - pixels(pictures[1])).max() <= 1


# --- the picture --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_opaque_images_of_any_mode_are_read_as_colours(mode, tmp_path):
    picture = stripes(16, 8, mode)
    picture.save(tmp_path / "a.png")
    tensor = read_init(tmp_path / "a.png", (8, 16))
    assert tensor.shape == (1, 3, 8, 16)
    wanted = np.asarray(picture.convert("RGB"))
    assert np.allclose(((tensor[0].permute(1, 2, 0) + 1) * 127.5).numpy(), wanted, atol=1e-3)


def test_an_image_of_the_same_aspect_ratio_is_resized_and_any_other_rejected(tmp_path):
    stripes(64, 32).save(tmp_path / "a.png")
    assert read_init(tmp_path / "a.png", (16, 32)).shape == (1, 3, 16, 32)
    with raises_naming(tmp_path / "a.png", "64x32", "16x16"):
        read_init(tmp_path / "a.png", (16, 16))


def test_images_that_cannot_be_used(tmp_path):
    with raises_naming("'F'"):
        image_tensor(Image.new("F", (16, 16)), (16, 16))
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nowhere.png", "."):
        with raises_naming(tmp_path / name):
            read_init(tmp_path / name, (16, 16))


# --- the command line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def init(tmp_path):
    stripes(16, 16).save(tmp_path / "init.png")
    return tmp_path / "init.png"


def test_the_command_line(finished_run, init, tmp_path):
    from wadi.cli.main import main

    def picture(*flags):
        path = tmp_path / "out.png"
        argv = ["generate", "red apple", "--run", str(finished_run), "--out", str(path), "--device", "cpu", "--seed", "9"]
        assert main([*argv, "--init", str(init), *flags]) == 0
        return pixels(Image.open(path))

    assert (picture() == picture("--strength", "0.8")).all()
    assert (picture() != picture("--strength", "0.3")).any()
    assert (picture("--strength", "0.3", "--steps", "2") != picture("--strength", "0.3")).any()
    wanted = redrawn(load(finished_run), stripes(16, 16), 0.8, seed=9)[0]
    # the prompts differ, but this student almost ignores them: both results come from the same start image
    assert np.abs(picture() - pixels(wanted)).mean() < 60


def test_a_large_start_is_encoded_in_tiles(finished_run, init, tmp_path, monkeypatch):
    from wadi.backbones import Backbone
    from wadi.cli.main import main
    from wadi.extras.high_resolution import resize

    tiled, encode = [], Backbone.encode_images

    def noting(backbone, images):
        tiled.append(backbone.pipeline.vae.use_tiling)
        return encode(backbone, images)

    monkeypatch.setattr(Backbone, "encode_images", noting)
    for above in (10**6, 16 * 16 - 1):
        monkeypatch.setattr(resize, "TILED_ABOVE", above)
        assert main(["generate", "a", "--run", str(finished_run), "--init", str(init), "--out", str(tmp_path / "o.png")]) == 0
    assert tiled == [False, True]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--strength", "0.5"], "--init"),
        (["--init", "INIT", "--strength", "0"], "--strength: '0'"),
        (["--init", "INIT", "--strength", "1.5"], "--strength: '1.5'"),
        (["--init", "INIT", "--strength", "nan"], "nan"),
        (["--init", "INIT", "--strength", "much"], "strength"),
        (["--init", "/nowhere.png"], "nowhere.png"),
        (["--init", "INIT", "--size", "32x16"], "aspect ratio"),
        (["--init", "INIT", "--compare"], "--compare and --init"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(flags, word, finished_run, init, tmp_path, capsys):
    from wadi.cli.main import main

    out = tmp_path / "x.png"
    flags = [str(init) if flag == "INIT" else flag for flag in flags]
    assert main(["generate", "apple", "--run", str(finished_run), "--out", str(out), "--device", "cpu", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line
    assert not out.exists()
