"""Images for the page: those of `wadi generate`, from one model for all visitors, with nothing left behind by a request."""

import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from raising import raises_naming
from wadi.app.models import KEPT, Models, Source, sources
from wadi.app.request import Limits, Request
from wadi.app.studio import Studio, caption
from wadi.backbones import loading
from wadi.pipelines.compose import Composition, compose
from wadi.pipelines.generate import Sampling, generate_images
from wadi.pipelines.load import load, load_teacher_pipeline


def studio_of(*runs, **limits):
    return Studio(Models(sources([str(run) for run in runs]), torch.float32, "cpu"), Limits(**limits))


@pytest.fixture
def studio(finished_run):
    return studio_of(finished_run)


def request(**changes):
    return Request(**{"model": "finished", "prompt": "red apple", **changes})


def same(images, others):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, others, strict=True))


def test_images_are_those_of_the_command_line(studio, finished_run):
    found = studio.student(request(seed=5, count=2))
    expected = generate_images(load(finished_run), ["red apple"] * 2, [5, 6], Sampling(steps=1))
    assert same(found.images, expected.images)
    assert (found.seeds, found.steps) == ([5, 6], 1)
    slow = studio.teacher(request(seed=5, count=2, teacher_steps=3))
    expected = generate_images(load_teacher_pipeline(finished_run), ["red apple"] * 2, [5, 6], Sampling(3, 2.0))
    assert same(slow.images, expected.images)
    assert slow.steps == 3
    assert caption("Student", found).startswith("Student: 1 step, ")
    assert caption("Teacher", slow).startswith("Teacher: 3 steps, ")


def test_a_request_leaves_nothing_behind_for_the_next(studio, tmp_path):
    before = studio.student(request(seed=1)).images
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    other = studio.student(request(seed=1, size=(32, 16)))
    assert other.images[0].size == (16, 32)
    assert studio.student(request(seed=1, steps=3)).steps == 3
    studio.student(request(seed=1, init=str(tmp_path / "red.png"), strength=0.4))
    assert same(studio.student(request(seed=1)).images, before)


def test_many_visitors_at_once_get_their_own_images(studio):
    expected = {seed: studio.student(request(seed=seed)).images for seed in range(6)}
    found = {}
    visitors = [
        threading.Thread(target=lambda s=seed: found.update({s: studio.student(request(seed=s % 6, count=1 + s % 2))}))
        for seed in range(12)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert len(found) == 12
    assert all(same(images.images[:1], expected[seed % 6]) for seed, images in found.items())
    assert not same(expected[0], expected[1])


def test_an_upload_is_cropped_to_the_size_and_starts_the_image(studio, finished_run, tmp_path):
    wide = Image.new("RGB", (64, 32), "blue")
    wide.paste(Image.effect_noise((32, 32), 80).convert("RGB"), (16, 0))
    wide.save(tmp_path / "wide.png")
    wide.crop((16, 0, 48, 32)).save(tmp_path / "middle.png")
    found = studio.student(request(seed=3, init=str(tmp_path / "wide.png"), strength=0.5))
    composed = compose(load(finished_run), Composition(init=tmp_path / "middle.png", strength=0.5))
    with composed.at_size():
        expected = generate_images(composed.pipeline, ["red apple"], [3], composed.sampling())
    assert same(found.images, expected.images)


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a"])
def test_an_upload_that_is_no_image_is_named_without_its_folder(studio, tmp_path, content):
    (tmp_path / "holiday.png").write_bytes(content)
    with raises_naming("holiday.png", "start image") as caught:
        studio.student(request(init=str(tmp_path / "holiday.png")))
    assert str(tmp_path) not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(studio, tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with raises_naming("bomb.png", "89,478,485"):
        studio.student(request(init=str(tmp_path / "bomb.png")))


def test_bounds_on_the_size_follow_the_model(finished_run):
    with raises_naming("64 x 16", "32"):
        studio_of(finished_run).student(request(size=(16, 64)))
    with raises_naming("20x16"):  # no multiple of what the network needs
        studio_of(finished_run).student(request(size=(16, 20)))
    assert studio_of(finished_run, side=48).student(request(size=(16, 48))).images[0].size == (48, 16)


def test_names_that_are_not_on_the_page(studio, tmp_path):
    for name in ("../finished", str(tmp_path), "zoo", ""):
        with raises_naming(repr(name), "finished"):
            studio.student(request(model=name))
    with raises_naming("'zoo'", "finished"):  # the embedded ControlNet does not fit another teacher
        studio.student(request(control="zoo", condition=str(tmp_path / "x.png")))


def test_a_run_that_vanishes_or_has_no_student_yet(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "mine")
    studio = studio_of(run)
    shutil.move(run / "student", tmp_path / "student")
    with raises_naming("no student yet"):
        studio.student(request(model="mine"))
    shutil.move(tmp_path / "student", run / "student")
    assert len(studio.student(request(model="mine")).images) == 1
    shutil.rmtree(run)
    for generate in (studio.student, studio.teacher):
        with raises_naming("mine", "gone"):
            generate(request(model="mine", teacher_steps=1))
    assert studio.controls_of("mine") == []


def test_a_student_that_its_run_saved_again_is_loaded_again(finished_run, sd_folder, prompts_path, tmp_path):
    from wadi.distill.loop import distill

    run = shutil.copytree(finished_run, tmp_path / "mine")
    studio = studio_of(run)
    before = studio.student(request(model="mine")).images
    other = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "other", student={"timesteps": [800], "lr": 0.5}))
    shutil.rmtree(run / "student")
    shutil.copytree(other / "student", run / "student")
    assert not same(studio.student(request(model="mine")).images, before)
    assert len(studio.models._loaded) == 1


def test_few_models_are_kept(finished_run, tmp_path, monkeypatch):
    runs = [shutil.copytree(finished_run, tmp_path / str(i) / "mine") for i in range(KEPT + 2)]
    found = sources(list(map(str, runs)))
    assert [source.name for source in found] == ["mine", "mine (2)", "mine (3)", "mine (4)"]
    models = Models(found, torch.float32, "cpu")
    calls, plain = [], loading.load_pipeline
    monkeypatch.setattr("wadi.pipelines.load.load_pipeline", lambda *args: (calls.append(args), plain(*args))[1])
    for source in (*found, found[-1], found[0]):
        models.student(source.name)
    assert len(calls) == KEPT + 3
    assert len(models._loaded) == KEPT


def test_what_is_given_on_the_command_line(finished_run, tmp_path):
    assert sources([]) == sources(["zoo"]) == [Source("zoo", None)]
    assert not Source("zoo", None).is_run
    assert Source("zoo", None).teacher == "zoo"
    with raises_naming(tmp_path, "config.yaml"):
        sources([str(tmp_path)])
    load(finished_run).save_pretrained(tmp_path / "export")
    studio = studio_of(tmp_path / "export")
    assert same(studio.student(request(model="export")).images, studio_of(finished_run).student(request()).images)
    with raises_naming("export", "no teacher"):
        studio.teacher(request(model="export", teacher_steps=1))


def test_the_embedded_student_takes_the_embedded_control(tmp_path):
    studio = studio_of()
    assert studio.controls_of("zoo") == ["zoo"]
    plain = studio.student(Request("zoo", "red apple", 7))
    square = Image.new("RGB", (100, 100), "white")
    square.paste("black", (30, 30, 70, 70))
    square.save(tmp_path / "square.png")
    controlled = studio.student(Request("zoo", "red apple", 7, control="zoo", condition=str(tmp_path / "square.png")))
    assert controlled.images[0].size == (64, 64)
    assert not same(controlled.images, plain.images)
    assert same(studio.student(Request("zoo", "red apple", 7)).images, plain.images)
