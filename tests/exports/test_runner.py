"""The runner of ONNX and OpenVINO exports: its tokens are those of the pipeline, its steps those of the noising process."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import runtime_folders
import small_exports
import torch
from PIL import Image

from raising import raises_naming
from wadi.backbones import from_pipeline
from wadi.diffusion.process import Process
from wadi.exports import prompt_inputs
from wadi.exports.prompt_inputs import given_inputs, read_prompt_inputs
from wadi.exports.runtime_folder import ALONE
from wadi.runtime.run import Student

small_pipelines = small_exports.small_pipelines

BLOCK = ALONE.partition("folder, work")[0]
PROMPTS = ["Red Apple", "apple"]


# Their prompts go through a chat template, or are not padded.
UNKNOWN = ("z-image", "qwen-image", "flux2", "flux2-klein")


def small_backbone(name, folder):
    return from_pipeline(small_pipelines.make(name, folder), small_pipelines.RESOLUTIONS.get(name))


# --- tokens -----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The prompt")
@pytest.mark.parametrize("name", [name for name in small_pipelines.MAKERS if name not in UNKNOWN])
def test_the_runners_tokens_give_the_condition_of_the_pipeline(name, tmp_path):
    backbone = small_backbone(name, tmp_path / "parts")
    before = dict(backbone.pipeline.components)
    parts = read_prompt_inputs(backbone)
    runtime_folders.write_settings(tmp_path, parts)
    student = Student(tmp_path)
    for prompt in (" Blue  FOX ", "a long prompt " * 40, "Ä 🍐!"):
        inputs = student.tokenize(prompt)
        names = [name for part in parts for name in part.names]
        assert list(inputs) == names
        with given_inputs(backbone, parts, [torch.from_numpy(inputs[name]) for name in names]):
            condition = backbone.encode(["another"])
        expected = backbone.encode([prompt])
        assert condition.tensors.keys() == expected.tensors.keys()
        assert [key for key, tensor in expected.tensors.items() if not torch.equal(tensor, condition.tensors[key])] == []
    assert backbone.pipeline.components == before


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_ways_to_encode_a_prompt_are_errors(name, tmp_path):
    backbone = small_backbone(name, tmp_path / "parts")
    with raises_naming(type(backbone.pipeline).__name__, "--to diffusers"):
        read_prompt_inputs(backbone)


def test_a_long_prompt_is_cut_with_a_warning(tmp_path):
    runtime_folders.write_settings(tmp_path, read_prompt_inputs(small_backbone("sd1", tmp_path / "parts")))
    with pytest.warns(UserWarning, match="wolf wolf"):
        Student(tmp_path).tokenize("wolf " * 50)


def test_pipelines_that_change_prompts_in_an_unknown_way_are_errors(tmp_path):
    backbone = small_backbone("sd1", tmp_path / "parts")
    encode = backbone.pipeline.encode_prompt
    backbone.pipeline.encode_prompt = lambda prompts, *args, **kwargs: encode([p[::-1] for p in prompts], *args, **kwargs)
    with raises_naming("StableDiffusionPipeline", prompt_inputs.PROBE[::-1], "--to diffusers"):
        read_prompt_inputs(backbone)
    backbone.pipeline.encode_prompt = lambda *args, **kwargs: encode(*args, **kwargs) and encode(*args, **kwargs)
    with raises_naming("StableDiffusionPipeline", "tokenizer 2 times"):
        read_prompt_inputs(backbone)


def test_a_tokenizer_file_that_gives_other_tokens_is_an_error(tmp_path, monkeypatch):
    from tokenizers import Tokenizer

    backbone = small_backbone("sd1", tmp_path / "parts")
    load = Tokenizer.from_str

    class Unpadded:
        @staticmethod
        def from_str(text):
            tokenizer = load(text)
            tokenizer.no_padding()
            return tokenizer

    monkeypatch.setattr("tokenizers.Tokenizer", Unpadded)
    with raises_naming("tokenizer.json"):
        read_prompt_inputs(backbone)


# --- steps ------------------------------------------------------------------------------------------------------------------

TABLE = torch.linspace(1, 0.05, 1000)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "velocity"])
@pytest.mark.parametrize("timesteps", [(800,), (799, 399, 199)])
def test_the_steps_are_those_of_the_noising_process(kind, timesteps, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    process = Process(kind, 1000, None if kind == "velocity" else TABLE)
    t = torch.tensor(timesteps)
    schedule = {"alphas": process.alpha(t).tolist(), "sigmas": process.sigma(t).tolist(), "timesteps": list(timesteps)}
    student = Student(runtime_folders.write_formula(tmp_path / "export", prediction=kind, **schedule))
    noise = student.noise([3, 4])
    words = torch.tensor([(100 + 200) / 4000, 200 / 4000])
    x0 = torch.zeros(2, 3, 2, 2)
    for i, (timestep, eps) in enumerate(zip(timesteps, noise, strict=True)):
        steps = torch.full((2,), timestep)
        x_t = torch.from_numpy(eps) if i == 0 else process.add_noise(x0, torch.from_numpy(eps), steps)
        x0 = process.x0(x_t / 4 + timestep / 1000 + words.view(2, 1, 1, 1), x_t, steps)
    latents = student.latents(student.encode(PROMPTS), noise)
    np.testing.assert_allclose(latents, x0, atol=1e-5, rtol=1e-5)
    images = student.generate(PROMPTS, [3, 4], batch=1)
    expected = np.rint(255 * x0.clamp(0, 1).numpy()).transpose(0, 2, 3, 1)
    assert np.abs(np.stack([np.asarray(image, int) for image in images]) - expected).max() <= 1


@pytest.fixture
def student(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return Student(runtime_folders.write_formula(tmp_path / "export"))


def test_an_image_depends_on_its_own_seed_and_prompt_only(student):
    four = student.generate(["red", "apple", "red apple", "x"], [5, 6, 7, 2**63 - 1], batch=3)
    (alone,) = student.generate(["red apple"], [7])
    assert np.array_equal(np.asarray(four[2]), np.asarray(alone))
    assert not np.array_equal(np.asarray(four[0]), np.asarray(student.generate(["red"], [8])[0]))


def test_latents_are_rounded_as_a_network_in_float16_sees_them(student):
    noise, condition = [np.full((1, 3, 2, 2), 1.0001, np.float32)], student.encode(["red"])
    exact = student.latents(condition, noise)
    student.settings["rounds_latents"] = True
    rounded = student.latents(condition, noise)
    assert np.array_equal(rounded, student.latents(condition, [np.ones((1, 3, 2, 2), np.float32)]))
    assert not np.array_equal(rounded, exact)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": (2, 4)}, ("2 x 4", "2 x 2")),
        ({"seeds": [-1, 0]}, ("-1",)),
        ({"seeds": [2**63, 0]}, (str(2**63),)),
        ({"seeds": [1]}, ("2 prompts", "1 seed")),
        ({"batch": 9}, ("9", "8")),
        ({"batch": 0}, ("0",)),
        ({"noise": [np.zeros((2, 3, 2, 3))]}, ("(2, 3, 2, 3)", "(2, 3, 2, 2)")),
        ({"noise": [np.zeros((2, 3, 2, 2))] * 2}, ("1 arrays",)),
        ({"noise": [np.full((2, 3, 2, 2), np.nan)]}, ("NaN",)),
    ],
)
def test_bad_arguments_are_errors(student, arguments, named):
    with pytest.raises(ValueError) as error:
        student.generate(PROMPTS, **arguments)
    assert [value for value in named if value not in str(error.value)] == []


@pytest.mark.parametrize("prompts", ["red apple", []])
def test_prompts_must_be_a_list(student, prompts):
    with pytest.raises(ValueError, match="prompt"):
        student.generate(prompts)


def test_a_device_that_is_not_there_and_a_missing_file(student):
    with pytest.raises(ValueError, match=r"Warp.*CPU"):
        Student(student.folder, device="Warp")
    (student.folder / "network.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"network\.onnx"):
        Student(student.folder)


def run_alone(folder, *words):
    """Run ``run.py`` of an export in a process that cannot import torch, diffusers, transformers or wadi."""
    code = BLOCK + f"import runpy\nrunpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder)


def test_the_command_line_needs_no_torch(student):
    done = run_alone(student.folder, "red apple", "apple", "--seed", "7", "--size", "2x2", "--out", "made")
    assert done.returncode == 0, done.stderr
    for name, expected in zip(("7.png", "8.png"), student.generate(PROMPTS, [7, 8]), strict=True):
        assert np.array_equal(np.asarray(Image.open(student.folder / "made" / name)), np.asarray(expected))
    blocked = subprocess.run([sys.executable, "-c", BLOCK + "import torch", "x"], capture_output=True, text=True)
    assert "No module named 'torch'" in blocked.stderr


def test_mistakes_on_the_command_line_write_nothing(student):
    (student.folder / "there").mkdir()
    for words, named in (
        (["--size", "2x4"], "2 x 4"), (["--out", "there"], "there"), (["--count", "0"], "0"), (["--seed", "-1"], "-1"),
        (["--device", "Warp"], "Warp"),
    ):  # fmt: skip
        done = run_alone(student.folder, "red", *words)
        assert done.returncode == 2
        assert named in done.stderr
        assert "Traceback" not in done.stderr
    assert not (student.folder / "images").exists()
    assert list((student.folder / "there").iterdir()) == []


def test_importing_the_runner_does_not_import_torch():
    code = "import sys, wadi.runtime.run; assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parts_name_only_the_inputs_that_are_read(tmp_path):
    (part,) = read_prompt_inputs(small_backbone("sd1", tmp_path))
    assert part.names == ["input_ids"]
    assert replace(part, mask="m").names == ["input_ids", "m"]
    (part,) = read_prompt_inputs(small_backbone("sana", tmp_path / "sana"))
    assert part.names == ["input_ids", "attention_mask"]
    assert part.prefix
