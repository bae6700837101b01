"""`wadi generate` as a command: each image is written as it is made, the same command continues, nothing else is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.errors import WadiError
from wadi.io import image_folder
from wadi.pipelines.generate import draw, generate, load


@pytest.fixture(scope="module")
def student(finished_run):
    return load(finished_run)


@pytest.fixture
def command(finished_run, capsys):
    """Run ``wadi generate`` on the finished run; returns exit code, stdout and stderr."""

    def run(*argv, model=("--run", str(finished_run))):
        code = main(["generate", *map(str, argv), *model, "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder):
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


class Stop(Exception):
    pass


def stopping_after(pipeline, calls, monkeypatch):
    """Let the pipeline's autoencoder raise when it decodes batch ``calls + 1``."""
    plain, seen = pipeline.vae.decode, []

    def decode(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise Stop
        return plain(*args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", decode)


# --- a folder -----------------------------------------------------------------------------------------------------------------


def test_images_are_written_as_they_are_made_and_the_same_call_continues(student, tmp_path, monkeypatch):
    prompts, out = ["red apple", "blue car", "green tree", "yellow sun", "a cat"], tmp_path / "out"
    whole = tmp_path / "whole"
    generate(student, prompts, whole, batch=2, folder=True)
    with monkeypatch.context() as patch:
        stopping_after(student, 2, patch)
        with pytest.raises(Stop):
            generate(student, prompts, out, batch=2, folder=True)
    names = [f"0000{i}-{words}-{i}.png" for i, words in enumerate(["red-apple", "blue-car", "green-tree", "yellow-sun"])]
    assert sorted(path.name for path in out.glob("*.png")) == names
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    made = generate(student, prompts, out, batch=3, folder=True)
    assert made.kept == 4
    assert {name: (out / name).stat().st_mtime_ns for name in names} == before
    for path in whole.glob("*.png"):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(out / path.name)))
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines(out)] == [
        (path.name, prompt, seed) for path, prompt, seed in zip(made.paths, prompts, range(5), strict=True)
    ]
    assert generate(student, prompts, out, folder=True).kept == 5


def test_an_image_that_was_cut_off_or_is_missing_is_made_again(student, tmp_path):
    prompts = ["red apple", "blue car"]
    first, second = generate(student, prompts, tmp_path, folder=True).paths
    whole = second.read_bytes()
    second.unlink()
    with open(tmp_path / "images.jsonl", "a") as stream:
        stream.write('{"file": "00002-')  # of a process that was killed while it wrote
    assert generate(student, prompts, tmp_path, folder=True).kept == 1
    assert second.read_bytes() == whole
    assert all(line["file"] in (first.name, second.name) for line in lines(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"prompts": ["Red apple!", "blue car"]}, "red apple"),
        ({}, "changed since"),
    ],
    ids=["settings", "prompt", "file"],
)
def test_what_was_made_otherwise_is_refused_unless_overwritten(change, named, student, tmp_path):
    arguments = {"prompts": ["red apple", "blue car"], "folder": True, "settings": {"dtype": "float32"}}
    path = generate(student, out=tmp_path, **arguments).paths[0]
    if not change:
        Image.new("RGB", (16, 16), "red").save(path)
    before = content(tmp_path)
    with pytest.raises(WadiError, match=named):
        generate(student, out=tmp_path, **arguments | change)
    assert content(tmp_path) == before
    assert generate(student, out=tmp_path, **arguments | change, overwrite=True).kept == (0 if "settings" in change else 1)
    assert generate(student, out=tmp_path, **arguments | change).kept == 2


def test_a_file_of_the_users_is_never_replaced_silently(student, tmp_path):
    mine = tmp_path / "00000-red-apple-0.png"
    mine.write_bytes(b"mine")
    with pytest.raises(WadiError, match="00000-red-apple-0"):
        generate(student, ["red apple"], tmp_path, folder=True)
    assert content(tmp_path) == {mine.name: b"mine"}


@pytest.mark.parametrize("text", ["notes\n", "[]\n", '{"file": 3}\n', "[" * 5000 + "\n"])
def test_a_manifest_that_is_not_ours(text, student, tmp_path):
    (tmp_path / "images.jsonl").write_text(text)
    with pytest.raises(WadiError, match="line 1"):
        generate(student, ["red apple"], tmp_path, folder=True)
    assert (tmp_path / "images.jsonl").read_text() == text


def test_more_prompts_continue_the_same_folder(student, tmp_path):
    generate(student, ["red apple", "blue car"], tmp_path, folder=True)
    assert generate(student, ["red apple", "blue car", "a cat"], tmp_path, folder=True).kept == 2


def test_the_command_continues_and_compares_the_weights(command, finished_run, prompts_path, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = ["--prompts", prompts_path, "--out", out]
    assert command(*argv)[0] == 0
    before = content(out)
    (out / "00002-green-tree-2.png").unlink()
    code, told, _ = command(*argv, "--batch", "2")
    assert code == 0
    assert "3 of them there already" in told
    assert content(out).keys() == before.keys()
    with monkeypatch.context() as patch:  # all there: nothing is loaded
        patch.setattr("wadi.pipelines.generate.load", None)
        assert command(*argv)[0] == 0
    adapter = ("--adapter", str(finished_run / "student"))
    assert command(*argv, model=adapter)[0] == 0  # the same weights by another name
    for flags in (["--steps", "2"], ["--dtype", "bfloat16"]):
        code, _, told = command(*argv, *flags)
        assert code == 2
        assert flags[1] in told
    assert command("--prompts", prompts_path, "--out", out, model=())[0] == 2  # the embedded student
    assert command(*argv, "--steps", "2", "--overwrite")[0] == 0
    assert content(out) != before


def test_settings_follow_what_files_contain(tmp_path):
    from wadi.cli.generate import content_of

    one, two = tmp_path / "1", tmp_path / "2"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a.json").write_text("{}")
    assert content_of(str(one)) == content_of(str(two)) != str(one)
    (two / "a.json").write_text("[]")
    assert content_of(str(one)) != content_of(str(two))
    assert content_of([str(one / "a.json"), "owner/name", 0.5])[1:] == ["owner/name", 0.5]


# --- before anything is generated ---------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loads(monkeypatch):
    """The test fails if a pipeline is loaded."""
    monkeypatch.setattr("wadi.pipelines.generate.load_pipeline", lambda *_, **__: pytest.fail("a pipeline was loaded"))


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["apple", "--out", "TMP/a.jpg"], ("a.jpg", ".png")),
        (["apple", "--out", "TMP/mine/a.png"], ("mine",)),
        (["apple", "--out", "TMP"], ("TMP",)),
        (["--prompts", "TMP/p.txt", "--out", "TMP/mine"], ("mine",)),
        (["--prompts", "TMP/p.txt", "--compare", "--out", "TMP/mine"], ("mine",)),
        (["apple", "--init", "TMP/i.png", "--out", "TMP/i.png"], ("i.png", "--init")),
        (["apple", "--control", "zoo", "--condition", "TMP/i.png", "--out", "TMP/i.png"], ("i.png", "--condition")),
        (["apple", "--adapter", "x"], ("--run", "--adapter")),
        (["apple", "--teacher_steps", "4"], ("--teacher_steps", "--compare")),
        (["apple", "--guidance_scale", "4"], ("--guidance_scale", "--compare")),
        (["apple", "--overwrite"], ("--overwrite", "--prompts")),
        (["apple", "--count", "0"], ("--count", "0")),
        (["apple", "--count", "999999999"], ("--count", "999999999")),
        (["apple", "--batch", "-1"], ("--batch", "-1")),
        (["apple", "--batch", "99999999"], ("--batch", "99999999")),
        (["apple", "--seed", "-1"], ("--seed", "-1")),
        (["apple", "--seed", str(2**63 - 1), "--count", "2"], ("2^63",)),
        (["apple", "--steps", "0"], ("steps", "0")),
        (["apple", "--steps", "1000"], ("steps", "1000")),
        (["apple", "--compare", "--teacher_steps", "1001"], ("--teacher_steps", "1001")),
        (["apple", "--compare", "--guidance_scale", ".nan"], ("guidance_scale", "nan")),
        (["apple", "--compare", "--guidance_scale", "nan"], ("guidance_scale", "nan")),
        (["apple", "--compare", "--guidance_scale", "inf"], ("guidance_scale", "inf")),
        (["apple", "--init", "TMP/i.png", "--strength", "nan"], ("strength", "nan")),
        (["apple", "--lora", "x", "--lora_scale", "nan"], ("lora_scale", "nan")),
        (["apple", "--control", "zoo", "--condition", "TMP/i.png", "--control_scale", "inf"], ("control_scale", "inf")),
        (["apple", "--size", "0x0"], ("0x0",)),
        (["apple", "--size", "1000000x1000000"], ("1000000x1000000",)),
        (["apple", "--size", "16"], ("16",)),
        (["apple", "--size", "65536x65536"], ("65536x65536", f"{65536**2 * 27:,}")),
        (["apple", "--size", "16x16", "--redilate", "0.5"], ("0.5",)),
        (["apple", "--dtype", "int8"], ("int8",)),
    ],
)
def test_refused_before_anything_is_loaded(argv, words, command, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "p.txt").write_text("red apple\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    before = content(tmp_path)
    code, out, err = command(*(str(word).replace("TMP", str(tmp_path)) for word in argv))
    assert code == 2, (out, err)
    assert err.startswith("wadi: ")
    assert err.count("\n") == 1
    assert all(word.replace("TMP", str(tmp_path)) in err for word in words), err
    assert content(tmp_path) == before


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("flags", [["--teacher", "zoo"], ["--compare"]])
def test_an_export_has_no_teacher(flags, command, sd_folder, tmp_path):
    code, _, err = command("apple", *flags, "--out", tmp_path / "x.png", model=("--run", str(sd_folder)))
    assert code == 2
    assert flags[0] in err
    assert str(sd_folder) in err


def test_a_comparison_honours_the_batch(command, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    plain, sizes = StableDiffusionPipeline.__call__, []

    def call(self, *args, **kwargs):
        sizes.append(len(kwargs["prompt"]))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    out = tmp_path / "x.png"
    assert command("apple", "--compare", "--teacher_steps", "1", "--count", "3", "--batch", "1", "--out", out)[0] == 0
    assert sizes == [1] * 8  # one each to begin with, and three each


# --- images that are no numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_of_nan_or_infinity_is_an_error(value, sd_folder, finished_run, tmp_path):
    pipeline = load(finished_run)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[1] = value
    with pytest.raises(WadiError, match="2 of 2 images"):
        generate(pipeline, ["red apple"], tmp_path / "x.png", count=2)
    with pytest.raises(WadiError, match="1 of 1 images"):
        generate(pipeline, ["red apple"], tmp_path / "folder", folder=True)
    assert list(tmp_path.iterdir()) == []
    assert "decode" not in vars(pipeline.vae)
    with pytest.raises(WadiError, match="1 of 1 images"):
        from_pipeline(pipeline).decode(torch.zeros(1, 4, 8, 8))
    backbone = from_pipeline(load_pipeline(sd_folder))
    with pytest.raises(WadiError, match="1 of 2 images"):
        backbone.decode(torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), value)]))


def test_finite_images_are_left_alone(student):
    first, second = (draw(student, ["red apple"], [3]).pictures[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert len(first.getcolors()) > 1


# --- stopped ------------------------------------------------------------------------------------------------------------------


def test_an_interrupt_keeps_what_is_written(finished_run, tmp_path):
    """Ctrl-C: the exit code of a signal, whole images, and the same command goes on."""
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("".join(f"apple {i}\n" for i in range(400)))
    argv = [sys.executable, "-m", "wadi", "generate", "--prompts", prompts, "--out", out, "--run", finished_run]
    argv = [str(word) for word in [*argv, "--batch", "1", "--device", "cpu"]]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    told, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert told == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    written = list(out.glob("*.png"))
    assert 3 <= len(written) < 400
    assert all(Image.open(path).load() for path in written)
    images = [image_folder.PlannedImage(f"{i:05d}-apple-{i}-{i}.png", f"apple {i}", i) for i in range(400)]
    settings = json.loads((out / "images.jsonl").read_text().splitlines()[0])["settings"]
    assert len(image_folder.missing_images(out, images, settings)) == 400 - len(written)
    assert os.listdir(out) == [name for name in os.listdir(out) if not name.startswith(".")]


def test_a_pipeline_of_another_size(tmp_path, capsys):
    """The smallest image of a class, and one whose decoded images alone do not fit, are told apart."""
    tiny.stable_diffusion(tmp_path / "parts").save_pretrained(tmp_path / "pipeline")
    argv = ["generate", "apple", "--run", str(tmp_path / "pipeline"), "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert main([*argv, "--size", "8x8"]) == 0
    assert Image.open(tmp_path / "x.png").size == (8, 8)
    assert main([*argv, "--size", "12x12"]) == 2
    assert "12x12" in capsys.readouterr().err
