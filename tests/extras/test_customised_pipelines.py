"""The options of `wadi generate` work together, or end in an error of one line before a model is loaded."""

from itertools import combinations

import numpy as np
import pytest
import torch
from onestep import randomise
from PIL import Image

from wadi import roles
from wadi.backbones import load_pipeline
from wadi.cli.main import main
from wadi.extras.lora import ADAPTER_NAME
from wadi.extras.lora.training import attach_lora, write_lora
from wadi.lorad import LoRaDConfig

TARGETS = r".*(to_q|to_k|to_v|conv1|proj_in)"


@pytest.fixture(scope="module")
def parts(sd_folder, tmp_path_factory):
    """Write a file of every kind that the tiny student takes."""
    from diffusers import ControlNetModel
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("parts")
    pipeline = load_pipeline(sd_folder)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    randomise(control.controlnet_down_blocks.parameters(), 0.3)
    randomise(control.controlnet_mid_block.parameters(), 0.3)
    randomise(control.controlnet_cond_embedding.conv_out.parameters(), 0.3)
    control.save_pretrained(folder / "control")
    randomise(attach_lora(pipeline.unet, 3, TARGETS), 0.3)
    write_lora(pipeline, folder / "lora")
    network = load_pipeline(sd_folder).unet
    roles.attach(network, ADAPTER_NAME, LoRaDConfig(r=3, target_modules=TARGETS))
    randomise(roles.parameters(network, ADAPTER_NAME).values(), 0.5)
    roles.save(network, ADAPTER_NAME, folder / "lorad")
    save_file({"<R>": 3 * torch.randn(1, 32)}, folder / "token.safetensors", {"format": "pt", "token": "<R>"})
    values = np.zeros((16, 16, 3), np.uint8)
    values[4:12, 4:12] = 255
    Image.fromarray(values).save(folder / "square.png")
    Image.fromarray(values).resize((32, 32)).save(folder / "square32.png")
    return folder


def options(parts):
    """Return the flags of each option."""
    return {
        "control": ["--control", str(parts / "control"), "--condition", str(parts / "square.png"), "--control-scale", "1.5"],
        "lora": ["--lora", str(parts / "lora"), "--lora-scale", "0.8"],
        "lorad": ["--lora", str(parts / "lorad"), "--lora-scale", "0.8"],
        "token": ["--token", str(parts / "token.safetensors")],
        "size": ["--size", "32x32"],
        "disperse": ["--size", "32x32", "--disperse", "--redilate-blocks", "all", "--tiled-vae"],
        "steps": ["--steps", "3"],
        "init": ["--init", str(parts / "square.png"), "--strength", "0.7"],
    }


@pytest.fixture(scope="module")
def pixels(parts, finished_run, tmp_path_factory):
    """``pixels("size", "lora")`` are the pixels of an image generated with these options, as integers."""
    folder, images = tmp_path_factory.mktemp("generated"), {}

    def generate(*names):
        if names not in images:
            path = folder / f"{'-'.join(names) or 'plain'}.png"
            flags = [flag for name in names for flag in options(parts)[name]]
            argv = ["generate", "a <R> b", "--run", str(finished_run), "--device", "cpu", "--out", str(path), "--seed", "3"]
            assert main([*argv, *flags]) == 0
            images[names] = np.asarray(Image.open(path)).astype(int)
        return images[names]

    return generate


@pytest.mark.parametrize("name", ["control", "lora", "lorad", "token", "steps", "init"])
def test_each_option_has_an_effect(name, pixels):
    assert pixels(name).shape == pixels().shape == (16, 16, 3)
    assert (pixels(name) != pixels()).any()


def test_each_way_to_a_larger_size_has_an_effect(pixels):
    assert pixels("size").shape == pixels("disperse").shape == (32, 32, 3)
    assert (pixels("size") != pixels("disperse")).any()


PAIRS = [pair for pair in combinations(["control", "lora", "lorad", "token", "size", "disperse", "steps", "init"], 2)
         if pair not in (("lora", "lorad"), ("size", "disperse"))]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_any_two_options_work_together_and_both_have_an_effect(pair, pixels):
    both, one, other = pixels(*pair), pixels(pair[0]), pixels(pair[1])
    assert both.shape[0] == (32 if {"size", "disperse"} & set(pair) else 16)
    for alone in (one, other):
        assert alone.shape != both.shape or (alone != both).any()


def test_a_control_with_a_lora_at_twice_the_size(pixels):
    three = pixels("control", "lora", "size")
    assert three.shape == (32, 32, 3)
    for two in (("control", "lora"), ("control", "size"), ("lora", "size")):
        assert pixels(*two).shape != three.shape or (pixels(*two) != three).any()


def test_all_options_at_once(pixels):
    names = ("control", "lora", "token", "disperse", "steps", "init")
    everything = pixels(*names)
    assert everything.shape == (32, 32, 3)
    for left_out in names:
        if left_out not in ("disperse",):
            rest = tuple(name for name in names if name != left_out)
            assert (pixels(*rest) != everything).any(), left_out


def test_the_images_of_a_batch_do_not_affect_one_another(parts, finished_run, tmp_path):
    flags = [flag for name in ("control", "size", "steps", "init") for flag in options(parts)[name]]
    argv = ["generate", "a b", "--run", str(finished_run), "--device", "cpu", *flags]
    assert main([*argv, "--out", str(tmp_path / "one.png"), "--seed", "5"]) == 0
    assert main([*argv, "--out", str(tmp_path / "three.png"), "--seed", "4", "--count", "3"]) == 0
    alone, in_batch = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "three-5.png"))
    assert np.abs(alone - in_batch).max() <= 1


def image(parts, finished_run, tmp_path, *flags, prompt="a <R> b"):
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
    argv = ["generate", prompt, "--run", str(finished_run), "--device", "cpu", "--seed", "3", "--out", str(out)]
    assert main([*argv, *map(str, flags)]) == 0
    return np.asarray(Image.open(out)).astype(int)


def test_several_loras_are_applied_in_turn(parts, finished_run, tmp_path):
    lora_, lorad = ("--lora", parts / "lora"), ("--lora", parts / "lorad")
    scales = ("--lora-scale", "0.8", "--lora-scale", "0")
    first, second = (image(parts, finished_run, tmp_path, *one) for one in (lora_, lorad))
    both = image(parts, finished_run, tmp_path, *lora_, *lorad)
    assert (both != first).any()
    assert (both != second).any()
    weaker = image(parts, finished_run, tmp_path, *lora_, "--lora-scale", "0.8")
    assert np.array_equal(image(parts, finished_run, tmp_path, *lora_, *lorad, *scales), weaker)
    assert np.array_equal(image(parts, finished_run, tmp_path, *lorad, *lora_, *scales[2:], *scales[:2]), weaker)


def test_several_tokens_can_be_used(parts, finished_run, tmp_path):
    from safetensors.torch import save_file

    save_file({"emb_params": 3 * torch.randn(1, 32)}, tmp_path / "other.safetensors")
    one, other = ("--token", parts / "token.safetensors"), ("--token", tmp_path / "other.safetensors")
    names = ("--token-name", "<R>", "--token-name", "<S>")
    alone = image(parts, finished_run, tmp_path, *one)
    assert np.array_equal(image(parts, finished_run, tmp_path, *one, *other, *names), alone)
    assert (image(parts, finished_run, tmp_path, *one, *other, *names, prompt="a <S> b") != alone).any()


def test_several_controlnets_can_be_used(parts, finished_run, tmp_path):
    control, shown = ("--control", parts / "control"), ("--condition", parts / "square.png")
    detectors = ("--condition-from", "canny", "--condition-from", "none")
    alone = image(parts, finished_run, tmp_path, *control, *shown, "--condition-from", "canny")
    twice = (*control, *shown, *control, *shown, *detectors)
    off = image(parts, finished_run, tmp_path, *twice, "--control-scale", "1", "--control-scale", "0")
    assert np.abs(off - alone).max() <= 1
    assert (image(parts, finished_run, tmp_path, *twice) != alone).any()


def test_compare_takes_lora_token_and_steps(parts, finished_run, tmp_path):
    flags = [flag for name in ("lora", "token", "steps") for flag in options(parts)[name]]
    out = tmp_path / "compared.png"
    argv = ["generate", "a <R> b", "--run", str(finished_run), "--device", "cpu", "--compare", "--teacher-steps", "2", *flags]
    assert main([*argv, "--out", str(out)]) == 0
    assert Image.open(out).size[1] > 32


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--size", "12x16"], ("12x16", "8")),
        (["--size", "32"], ("'32'",)),
        (["--size", "0x0"], ("0x0",)),
        (["--size", "-32x32"], ("size",)),
        (["--size", "32x32", "--redilate", "0.5"], ("0.5",)),
        (["--size", "32x32", "--redilate", "twice"], ("'twice'",)),
        (["--size", "32x32", "--redilate-blocks", "up_blocks.9"], ("'up_blocks.9'", "mid_block")),
        (["--size", "24x24", "--disperse"], ("1.5",)),
        (["--redilate", "2"], ("--redilate", "--size")),
        (["--redilate-blocks", "all"], ("--redilate-blocks", "--size")),
        (["--disperse"], ("--disperse", "--size")),
        (["--control", "CONTROL"], ("--control", "--condition")),
        (["--condition", "SQUARE"], ("--condition", "--control")),
        (["--control-scale", "1"], ("--control-scale", "--control")),
        (["--condition-from", "canny"], ("--condition-from", "--control")),
        (["--lora-scale", "1"], ("--lora-scale", "--lora")),
        (["--compare", "--size", "32x32"], ("--compare", "--size")),
        (["--compare", "--control", "CONTROL", "--condition", "SQUARE"], ("--compare", "--control")),
        (["--control", "/nowhere", "--condition", "SQUARE"], ("/nowhere",)),
        (["--control", "CONTROL", "--condition", "/nowhere.png"], ("/nowhere.png",)),
        (["--control", "CONTROL", "--condition", "SQUARE", "--size", "32x16"], ("16 x 16", "32 x 16")),
        (["--control", "CONTROL", "--condition", "SQUARE", "--condition-from", "sketch"], ("'sketch'", "canny")),
        (["--lora", "/nowhere.safetensors"], ("/nowhere.safetensors",)),
        (["--lora", "LORA", "--lora-scale", "nan"], ("scale", "nan")),
        (["--token", "/nowhere.safetensors"], ("/nowhere.safetensors",)),
        (["--steps", "51"], ("51",)),
        (["--lora", "LORA", "--lora", "LORA", "--lora-scale", "1"], ("--lora-scale", "--lora", "1", "2")),
        (["--lora", "LORA", "--lora-scale", "1", "--lora-scale", "1"], ("--lora-scale", "2")),
        (["--control", "CONTROL", "--control", "CONTROL", "--condition", "SQUARE"], ("--condition", "--control", "1", "2")),
        (["--token", "TOKEN", "--token-name", "R"], ("'R'",)),
        (["--token-name", "<R>"], ("--token-name", "--token")),
        (["--lora", "LORA", "--lora-scale", "much"], ("--lora-scale", "'much'")),
        (["--control", "CONTROL", "--condition", "SQUARE", "--control-mode", "1.5"], ("--control-mode", "'1.5'")),
        (["--image-encoder", "x"], ("--image-encoder", "--control")),
        (["--control", "CONTROL", "--condition", "SQUARE", "--control-mode", "1"], ("mode 1",)),
        (["--control", "CONTROL", "--condition", "SQUARE", "--control-scale", "nan"], ("control-scale", "nan")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_in_one_line_and_nothing_is_written(flags, named, parts, finished_run, tmp_path, capsys):
    places = {
        "CONTROL": parts / "control",
        "SQUARE": parts / "square.png",
        "LORA": parts / "lora",
        "TOKEN": parts / "token.safetensors",
    }
    flags = [str(parts / places[flag]) if flag in places else flag for flag in flags]
    out = tmp_path / "x.png"
    assert main(["generate", "apple", "--run", str(finished_run), "--out", str(out), "--device", "cpu", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wadi: ")
    assert all(value in line for value in named), line
    assert not out.exists()
