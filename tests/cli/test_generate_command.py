"""`wadi generate`: the same command continues, bad options are named before anything is loaded, no other file is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

import tiny
from wadi.cli.main import main
from wadi.io import image_folder


@pytest.fixture
def command(finished_run, capsys):
    """Run ``wadi generate`` on the finished run; returns exit code, stdout and stderr."""

    def run(*argv, model=("--run", str(finished_run))):
        code = main(["generate", *map(str, argv), *model, "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- a folder -----------------------------------------------------------------------------------------------------------------


def test_the_command_continues_and_compares_the_weights(command, finished_run, prompts_path, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = ["--prompts", prompts_path, "--out", out]
    assert command(*argv)[0] == 0
    before = content(out)
    (out / "00002-green-tree-2.png").unlink()
    code, printed, _ = command(*argv, "--batch", "2")
    assert code == 0
    assert "4 image(s), 3 of them" in printed
    assert content(out).keys() == before.keys()
    with monkeypatch.context() as patch:  # all there: nothing is loaded
        patch.setattr("wadi.pipelines.load.load", None)
        assert command(*argv)[0] == 0
    adapter = ("--adapter", str(finished_run / "student"))
    assert command(*argv, model=adapter)[0] == 0  # the same weights by another name
    for flags in (["--steps", "2"], ["--dtype", "bfloat16"]):
        code, _, err = command(*argv, *flags)
        assert code == 2
        assert flags[1] in err
    assert command("--prompts", prompts_path, "--out", out, model=())[0] == 2  # the embedded student
    assert command(*argv, "--steps", "2", "--overwrite")[0] == 0
    assert content(out) != before


def test_settings_follow_what_files_contain(tmp_path):
    from wadi.cli.generate_settings import content_of

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
    monkeypatch.setattr("wadi.pipelines.load.load_pipeline", lambda *_, **__: pytest.fail("a pipeline was loaded"))


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
        (["apple", "--teacher_steps", "4"], ("--teacher-steps", "--compare")),
        (["apple", "--guidance_scale", "4"], ("--guidance-scale", "--compare")),
        (["apple", "--overwrite"], ("--overwrite", "--prompts")),
        (["apple", "--count", "0"], ("--count", "0")),
        (["apple", "--count", "999999999"], ("--count", "999999999")),
        (["apple", "--batch", "-1"], ("--batch", "-1")),
        (["apple", "--batch", "99999999"], ("--batch", "99999999")),
        (["apple", "--seed", "-1"], ("--seed", "-1")),
        (["apple", "--seed", str(2**63 - 1), "--count", "2"], ("2^63",)),
        (["apple", "--steps", "0"], ("steps", "0")),
        (["apple", "--steps", "1000"], ("steps", "1000")),
        (["apple", "--compare", "--teacher_steps", "1001"], ("teacher", "1001")),
        (["apple", "--compare", "--guidance_scale", ".nan"], ("guidance", "nan")),
        (["apple", "--compare", "--guidance_scale", "nan"], ("guidance", "nan")),
        (["apple", "--compare", "--guidance_scale", "inf"], ("guidance", "inf")),
        (["apple", "--init", "TMP/i.png", "--strength", "nan"], ("strength", "nan")),
        (["apple", "--lora", "x", "--lora_scale", "nan"], ("lora-scale", "nan")),
        (["apple", "--control", "zoo", "--condition", "TMP/i.png", "--control_scale", "inf"], ("control-scale", "inf")),
        (["apple", "--size", "0x0"], ("0x0",)),
        (["apple", "--size", "1000000x1000000"], ("1000000x1000000",)),
        (["apple", "--size", "16"], ("16",)),
        (["apple", "--size", "65536x65536"], ("65536x65536", f"{65536**2 * 27:,}")),
        (["apple", "--size", "16x16", "--redilate", "0.5"], ("0.5",)),
        (["apple", "--dtype", "int8"], ("int8",)),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(argv, words, command, tmp_path):
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


def test_a_comparison_uses_the_batch(command, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    plain, sizes = StableDiffusionPipeline.__call__, []

    def call(self, *args, **kwargs):
        sizes.append(len(kwargs["prompt"]))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    out = tmp_path / "x.png"
    assert command("apple", "--compare", "--teacher_steps", "1", "--count", "3", "--batch", "1", "--out", out)[0] == 0
    assert sizes == [1] * 8  # one of each pipeline to set it up, then three of each


# --- stopped ------------------------------------------------------------------------------------------------------------------


def test_an_interrupt_keeps_the_written_images(finished_run, tmp_path):
    """Ctrl-C gives the exit code of the signal and leaves complete images, which the same command continues from."""
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("".join(f"apple {i}\n" for i in range(400)))
    argv = [sys.executable, "-m", "wadi", "generate", "--prompts", prompts, "--out", out, "--run", finished_run]
    argv = [str(word) for word in [*argv, "--batch", "1", "--device", "cpu"]]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.05)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    out_text, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == 130
    assert out_text == ""
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
    tiny.stable_diffusion(tmp_path / "parts").save_pretrained(tmp_path / "pipeline")
    argv = ["generate", "apple", "--run", str(tmp_path / "pipeline"), "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert main([*argv, "--size", "8x8"]) == 0
    assert Image.open(tmp_path / "x.png").size == (8, 8)
    assert main([*argv, "--size", "12x12"]) == 2
    assert "12x12" in capsys.readouterr().err
