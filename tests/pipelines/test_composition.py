"""Everything that can be put on a pipeline goes on in one order, for Python users as for the command line."""

import numpy as np
import pytest
from PIL import Image
from students import one_image, same_image

from wadi.cli.main import main
from wadi.errors import WadiError
from wadi.extras import image_to_image
from wadi.extras.high_resolution import resize
from wadi.pipelines import compose as composing
from wadi.pipelines.compose import Composition, Control, Lora, Token, compose
from wadi.pipelines.generate import generate_images
from wadi.pipelines.load import load


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "init.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def generated(composed, prompt="red apple", seed=7):
    with composed.at_size():
        return generate_images(composed.pipeline, [prompt], [seed], composed.sampling()).images[0]


def test_an_empty_composition_changes_nothing(finished_run, pipeline):
    composed = compose(load(finished_run), Composition())
    assert composed.native == composed.size == (16, 16)
    assert same_image(generated(composed), one_image(pipeline, seed=7), off=0)


def test_a_composition_gives_the_image_of_the_command(finished_run, image, tmp_path):
    composed = compose(load(finished_run), Composition(size=(32, 32), steps=2, init=image, strength=0.5, redilate=1.5))
    expected = generated(composed)
    argv = ["generate", "red apple", "--run", str(finished_run), "--seed", "7", "--out", str(tmp_path / "x.png")]
    options = ["--size", "32x32", "--steps", "2", "--init", str(image), "--strength", "0.5", "--redilate", "1.5"]
    assert main([*argv, *options, "--device", "cpu"]) == 0
    assert same_image(Image.open(tmp_path / "x.png"), expected, off=0)
    assert expected.size == (32, 32)


def test_the_order_is_weights_size_start_image_control_schedule(finished_run, image, monkeypatch):
    calls = []

    def record(name, result=None):
        return lambda *args, **kwargs: calls.append(name) or (result(*args) if result else None)

    monkeypatch.setattr("wadi.extras.relation.token_file.add_token", record("token"))
    monkeypatch.setattr("wadi.extras.lora.apply.apply_lora", record("lora"))
    monkeypatch.setattr(resize, "set_resolution", record("size"))
    monkeypatch.setattr(image_to_image, "read_init", record("init", lambda *_: "pixels"))
    monkeypatch.setattr(image_to_image, "start_from", record("start"))
    monkeypatch.setattr(composing, "add_controls", record("control", lambda pipeline, *_: (pipeline, {"image": "edges"})))
    composition = Composition(
        tokens=[Token("t.safetensors")], loras=[Lora("l", 0.5)], controls=[Control("zoo", "c.png")], size=(32, 32), init=image
    )
    composed = compose(load(finished_run), composition)
    assert calls == ["token", "lora", "size", "init", "control", "start"]
    assert composed.call["image"] == "edges"
    assert composed.call["num_inference_steps"] == 1


@pytest.mark.parametrize(
    ("composition", "named"),
    [
        (Composition(tokens=[Token("nowhere.safetensors")]), "nowhere.safetensors"),
        (Composition(loras=[Lora("nowhere")]), "nowhere"),
        (Composition(size=(30, 32)), "32x30"),
        (Composition(init="nowhere.png"), "nowhere.png"),
        (Composition(controls=[Control("zoo", "nowhere.png")]), "nowhere.png"),
        (Composition(steps=99), "99"),
    ],
)
def test_what_cannot_be_put_on_is_named(composition, named, finished_run):
    with pytest.raises(WadiError, match=named):
        compose(load(finished_run), composition)
