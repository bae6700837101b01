"""ONNX and OpenVINO exports: the graphs compute what the backbone does, and their runner makes the student's images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_exports
import torch

import tiny
from raising import raises_naming
from wadi.backbones import from_pipeline
from wadi.cli.main import main
from wadi.exports import runtime_folder
from wadi.exports.graphs import trace
from wadi.exports.prompt_inputs import read_prompt_inputs
from wadi.exports.source import Source
from wadi.exports.write import Settings, export
from wadi.io.images import read_image
from wadi.runtime.run import Student

small_pipelines = small_exports.small_pipelines

ONE_BLOCK = {
    "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}  # fmt: skip
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf")}


def need(to):
    for package in PACKAGES[to]:
        pytest.importorskip(package)


def student_folder(name, folder, timesteps=(800,)):
    """A small pipeline saved as the merged student of a family."""
    pipeline = small_pipelines.make(name, folder / "parts")
    backbone = from_pipeline(pipeline, small_pipelines.RESOLUTIONS.get(name))
    backbone.remember_resolution()
    backbone.remember_timesteps(timesteps)
    pipeline.save_pretrained(folder / "student")
    return folder / "student"


def record(folder):
    return json.loads((folder / "export.json").read_text())


# --- without the packages ---------------------------------------------------------------------------------------------------


def test_the_graphs_compute_what_the_backbone_does(tmp_path):
    backbone = from_pipeline(small_pipelines.readied(tiny.stable_diffusion(tmp_path / "parts", **ONE_BLOCK)))
    parts = read_prompt_inputs(backbone)
    graphs = trace(backbone, parts)
    assert [graph.inputs for graph in graphs.values()] == [["input_ids"], ["x_t", "t", "prompt_embeds"], ["latents"]]
    assert graphs["network"].shapes == [[None, 4, 8, 8], [None], [None, 16, 32]]
    ids = backbone.pipeline.tokenizer(["blue fox"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        (embeds,) = graphs["text"].program.module()(ids)
        assert torch.equal(embeds, backbone.encode(["blue fox"]).tensors["prompt_embeds"])
        for batch in (1, 3):
            x, t = torch.randn(batch, 4, 8, 8), torch.full((batch,), 300)
            condition = backbone.encode(["red", "apple", ""][:batch])
            predicted = graphs["network"].program.module()(x, t, condition.tensors["prompt_embeds"])
            torch.testing.assert_close(predicted, backbone.predict(x, t, condition), atol=1e-5, rtol=1e-4)
            images = graphs["decoder"].program.module()(x)
            torch.testing.assert_close(images, backbone.decode(x), atol=1e-5, rtol=1e-4)


def test_a_part_that_cannot_be_traced_is_one_error(tmp_path):
    backbone = from_pipeline(tiny.stable_diffusion(tmp_path / "parts", **ONE_BLOCK))
    predict = backbone.predict
    backbone.predict = lambda x_t, t, condition: predict(x_t, t, condition) * (2 if float(x_t.sum()) > 0 else 1)
    with raises_naming("network", "StableDiffusionPipeline", "--to diffusers"):
        trace(backbone, read_prompt_inputs(backbone))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--to", "onnx", "--dtype", "bfloat16"], ("'bfloat16'", "int8")),
        (["--to", "openvino", "--dtype", "int4"], ("'int4'", "int8")),
        (["--to", "diffusers", "--dtype", "int8"], ("'int8'", "float16")),
        (["--to", "onnx", "--rank", "4"], ("--rank 4", "--to lora")),
    ],
)
def test_bad_options_write_nothing(words, named, finished_run, tmp_path, capsys):
    assert main(["export", str(finished_run), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert [value for value in named if value not in error] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "missing"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_extra(to, missing, finished_run, tmp_path, monkeypatch):
    present = {name: object() for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")}
    monkeypatch.setattr("wadi.io.installation.find_spec", lambda name: None if name == missing else present.get(name))
    with raises_naming(missing, f"wadi-onestep[{to}]"):
        export(Source(str(finished_run), images=1), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_int8_needs_nncf(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("wadi.io.installation.find_spec", lambda name: None if name == "nncf" else object())
    monkeypatch.setattr(runtime_folder, "write", lambda *_: pytest.fail("int8 began"))
    with raises_naming("nncf", "wadi-onestep[openvino]"):
        export(Source(str(finished_run), images=1), "openvino", tmp_path / "out", Settings(precision="int8"))


@pytest.mark.parametrize("to", PACKAGES)
def test_an_existing_folder(to, finished_run, tmp_path):
    (tmp_path / "there").mkdir()
    with raises_naming("there"):
        export(Source(str(finished_run), images=1), to, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("no such operator"), ("text", "--to diffusers")),
        (OSError(28, "No space left on device"), ("Free some space",)),
    ],
)
def test_a_converter_that_fails_leaves_nothing(error, named, tmp_path, monkeypatch):
    tiny.stable_diffusion(tmp_path / "parts", **ONE_BLOCK).save_pretrained(tmp_path / "student")
    before = set(tmp_path.iterdir())

    def fail(graph, path, precision):
        path.write_bytes(b"half")
        raise error

    runtime = runtime_folder.Runtime("onnx", "ONNX", "onnxruntime", ".onnx", {"float32": torch.float32}, fail)
    monkeypatch.setattr(
        "wadi.exports.write._writer", lambda to: lambda *args: runtime_folder.write(*args[:2], "float32", runtime)
    )
    with raises_naming(error.args[-1], *named):
        export(Source(str(tmp_path / "student"), images=1), "onnx", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_a_runner_that_fails_is_one_error(tmp_path):
    runtime = runtime_folder.Runtime("onnx", "ONNX", "onnxruntime", ".onnx", {}, lambda *_: None)
    (tmp_path / "run.py").write_text("raise ValueError('unreadable graph')")
    with raises_naming("ONNX", "unreadable graph", "--to diffusers"):
        runtime_folder.read(tmp_path, ["red"], [np.zeros((1, 4, 8, 8))], runtime)


# --- with them: each export takes half a minute, which the converters need ----------------------------------------------------

FAMILIES = [
    ("sd1", "onnx", "float32", 1), ("sd1", "openvino", "float32", 1), ("sd2", "onnx", "int8", 24),
    ("sd2", "openvino", "int8", 24), ("sdxl", "onnx", "float16", 3), ("sdxl", "openvino", "float32", 1),
    ("pixart-alpha", "onnx", "float32", 1), ("pixart-sigma", "openvino", "float16", 3), ("sd3", "onnx", "float32", 1),
    ("sd3", "openvino", "int8", 24), ("flux", "onnx", "float32", 1), ("flux", "openvino", "float32", 1),
    ("sana", "onnx", "float32", 1), ("sana", "openvino", "float32", 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to", "precision", "largest"), FAMILIES)
def test_every_family_is_read_back(name, to, precision, largest, tmp_path):
    need(to)
    folder = student_folder(name, tmp_path)
    exported = export(Source(str(folder), images=3), to, tmp_path / "out", Settings(precision=precision))
    assert exported.check.largest <= largest
    assert record(tmp_path / "out")["precision"] == precision
    student = Student(tmp_path / "out")
    (one,), (other,) = (student.generate(["apple"], [seed]) for seed in (0, 1))
    assert np.asarray(one).std() > 1
    assert not np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.slow
@pytest.mark.parametrize("to", PACKAGES)
@pytest.mark.parametrize(("name", "timesteps"), [("sd1", (799, 599, 399, 199)), ("sd3", (1000, 500))])
def test_students_of_several_steps(to, name, timesteps, tmp_path):
    need(to)
    folder = student_folder(name, tmp_path, timesteps)
    assert export(Source(str(folder), images=3), to, tmp_path / "out").check.largest <= 1
    settings = json.loads((tmp_path / "out" / "student.json").read_text())
    assert tuple(settings["timesteps"]) == timesteps
    assert len(settings["alphas"]) == len(settings["sigmas"]) == len(timesteps)


@pytest.mark.slow
@pytest.mark.parametrize("to", PACKAGES)
def test_the_embedded_student_by_the_command(to, tmp_path, capsys):
    need(to)
    out = tmp_path / "out"
    assert main(["export", "--to", to, "--out", str(out), "--images", "2"]) == 0
    assert str(out) in capsys.readouterr().out
    assert record(out)["check"]["largest"] <= 1
    files = [file for file in out.rglob("*") if file.is_file()]
    text = "".join(file.read_bytes().decode("latin1") for file in files)
    assert not [place for place in (tmp_path, Path(torch.__file__).parents[1], Path(__file__).parents[2]) if str(place) in text]
    code = (out / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names = {"FOLDER": str(out), "prompt": "red apple"}
    exec(code, names)
    assert names["image"].size == (64, 64)
    assert len(read_image(out / "images.png").getcolors(1 << 20)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("to", PACKAGES)
def test_a_full_disk_leaves_nothing(to, sd_folder, tmp_path, full_disk):
    need(to)
    with full_disk(60_000), raises_naming():
        export(Source(str(sd_folder), images=1), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", PACKAGES)
def test_the_extras_have_the_packages_that_the_command_needs(extra):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {re.split("[<>=;]", requirement)[0] for requirement in project["optional-dependencies"][extra]}
    assert named == set(PACKAGES[extra])
