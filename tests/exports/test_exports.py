"""Every format is read back by its own reader, and its card says how its images differ from the run's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import wadi
from processes import run_without_wadi
from raising import raises_naming
from wadi.cli.main import main
from wadi.exports import FORMATS as ALL
from wadi.exports.card import public_settings
from wadi.exports.source import Source, public_name
from wadi.exports.write import export
from wadi.exports.written import difference

FORMATS = [to for to in ALL if to not in ("onnx", "openvino")]  # those are in test_runtimes.py

PLAIN = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
for prompt, seed in (("red apple", 0), ("red apple", 1)):
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0].save(f"{sys.argv[2]}/{seed}.png")
"""


@pytest.fixture(scope="module")
def exports(finished_run, tmp_path_factory):
    """The finished run in every format."""
    folder = tmp_path_factory.mktemp("exports")
    for to in FORMATS:
        argv = ["export", str(finished_run), "--to", to, "--out", str(folder / to), "--images", "2"]
        assert main([*argv, "--base-name", "owner/teacher", "--licence", "mit"]) == 0
    return folder


def own_images(run):
    pipeline = wadi.load(run)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    return [pipeline("red apple", generator=torch.Generator().manual_seed(seed), **call).images[0] for seed in (0, 1)]


def record(folder):
    return json.loads((folder / "export.json").read_text())


def test_diffusers_makes_the_bytes_of_the_run_in_a_process_without_this_package(exports, finished_run, tmp_path):
    done = run_without_wadi(PLAIN, str(exports / "diffusers"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    for seed, image in enumerate(own_images(finished_run)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{seed}.png")), np.asarray(image))
    assert record(exports / "diffusers")["check"] == {"mean": 0.0, "largest": 0, "equal": 2, "images": 2}


def test_peft_reads_the_adapter_and_its_card_has_the_lines(exports, finished_run, sd_folder):
    folder = exports / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/teacher"
    assert record(folder)["check"]["equal"] == 2
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    code = code.replace("pipe(prompt", "pipe(prompt, generator=torch.Generator().manual_seed(1)")
    names = {"TEACHER": str(sd_folder), "FOLDER": str(folder), "prompt": "red apple", "torch": torch}
    exec(code, names)
    assert difference([names["image"]], own_images(finished_run)[1:]).largest <= 1
    again = wadi.load(adapter=folder, teacher=sd_folder)  # the card's other reader
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    image = again("red apple", generator=torch.Generator().manual_seed(1), **call).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(own_images(finished_run)[1]))


@pytest.mark.parametrize("to", FORMATS)
def test_no_export_says_where_it_was_made_and_each_has_a_card(exports, sd_folder, finished_run, to):
    files = [file for file in (exports / to).rglob("*") if file.is_file()]
    text = "".join(file.read_bytes().decode("latin1") for file in files)
    for place in (exports, sd_folder, finished_run, sd_folder.parent):
        assert str(place) not in text
    card = (exports / to / "README.md").read_text()
    for value in ("base_model: owner/teacher", "license: mit", "red apple", "student.rank", "images.png"):
        assert value in card
    grid = Image.open(exports / to / "images.png")
    assert grid.width > 2 * 16
    assert record(exports / to)["base"] == "owner/teacher"


def test_the_metrics_of_a_run_are_in_its_card(finished_run, tmp_path):
    import shutil

    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "eval").mkdir()
    result = {"rows": [{"name": str(run), "images": 7, "metrics": {"fid": {"value": 12.25, "std": 0.5}}}], "protocol": {}}
    (run / "eval" / "a.json").write_text(json.dumps({**result, "protocol_hash": "0"}))
    (run / "eval" / "b.json").write_text("damaged")
    export(Source(str(run), images=1), "diffusers", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "12.25" in card
    assert str(tmp_path) not in card


def test_a_merged_pipeline_becomes_a_lora_of_its_teacher_and_no_adapter(exports, sd_folder, tmp_path, capsys):
    merged = str(exports / "diffusers")
    argv = ["export", merged, "--to", "lora", "--out", str(tmp_path / "out"), "--images", "1"]
    assert main(argv) == 2
    assert "--teacher" in capsys.readouterr().err
    assert main([*argv, "--teacher", str(sd_folder), "--rank", "200"]) == 0
    assert record(tmp_path / "out")["check"]["largest"] <= 3
    assert main(["export", merged, "--to", "adapter", "--out", str(tmp_path / "adapter")]) == 2
    assert "wadi extract" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--to", "gguf"], ("'gguf'", "diffusers", "lora", "adapter")),
        (["--rank", "4"], ("--rank 4", "--to diffusers")),
        (["--images", "0"], ("0",)),
        (["--prompts", "/nowhere.txt"], ("/nowhere.txt",)),
        (["--run", "/nowhere"], ("/nowhere",)),
    ],
)
def test_bad_options_write_nothing(words, named, finished_run, tmp_path, capsys):
    assert main(["export", str(finished_run), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert [value for value in named if value not in error] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMATS)
def test_an_existing_folder_and_a_full_disk(to, finished_run, tmp_path, full_disk):
    (tmp_path / "there").mkdir()
    with raises_naming("there"):
        export(Source(str(finished_run), images=1), to, tmp_path / "there")
    with full_disk(3000), raises_naming("out"):
        export(Source(str(finished_run), images=1), to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_differences_and_names():
    black, grey = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), (6, 0, 0))
    found = difference([black, black], [black, grey])
    assert (found.mean, found.largest, found.equal, found.images) == (1.0, 6, 1, 2)
    assert public_name("owner/name?variant=fp16") == "owner/name"
    assert public_settings({"out": "x", "steps": 3, "student": {"rank": 4, "file": "/a/b"}}) == {"steps": 3, "student.rank": 4}
