"""``wadi dreambooth``: one command from a folder of pictures to an adapter, and one line for what cannot be."""

import json

import numpy as np
import pytest
from PIL import Image

from wadi.cli import main


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 60 + 90 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def refused(capsys):
    def run(*argv):
        code = main(["dreambooth", *map(str, argv)])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("wadi: ")
        assert out == ""
        return err

    return run


def short(subject, out, *more):
    """A training of two updates as a command line."""
    shared = ["--subject", subject, "--prompt", "sks apple", "--out", out, "--steps", 2, "--batch", 2, "--device", "cpu"]
    prior = ["--prior_prompt", "red apple", "blue car", "--prior_count", 3, "--prior_steps", 2]
    return [str(word) for word in (*shared, *prior, *more)]


@pytest.mark.parametrize("method", ["lorad", "lora", "full"])
def test_teacher_to_student_by_command(sd_folder, finished_run, subject_folder, tmp_path, capsys, method):
    out = tmp_path / "apple"
    carry = [] if method == "full" else ["--carry", finished_run]
    rank = [] if method == "full" else ["--rank", 2]
    assert main(["dreambooth", *short(subject_folder, out, "--teacher", sd_folder, "--method", method, *carry, *rank)]) == 0
    said = capsys.readouterr().out
    about = json.loads((out / "wadi.json").read_text())["dreambooth"]
    assert (about["prompt"], about["prior_prompt"], about["method"]) == ("sks apple", ["red apple", "blue car"], method)
    assert f"{about['parameters']:,} numbers trained" in said
    standard = {"lorad": "adapter_config.json", "lora": "pytorch_lora_weights.safetensors", "full": "model_index.json"}[method]
    assert (out / standard).is_file()
    picture = Image.open(out / "picture.png")
    rows = {"full": 3}.get(method, 4)
    assert picture.height > rows * 128
    assert "wadi generate" in said


def test_the_student_itself(finished_run, subject_folder, tmp_path, capsys):
    out = tmp_path / "apple"
    argv = short(subject_folder, out, "--student", finished_run, "--rank", 2, "--picture", "false")
    assert main(["dreambooth", *argv]) == 0
    assert json.loads((out / "wadi.json").read_text())["dreambooth"]["loss"] == "one-step"
    assert not (out / "picture.png").exists()
    assert f"--run {finished_run}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--teacher", "T", "--student", "S"], "both"),
        ([], "neither"),
        (["--teacher", "T", "--loss", "one-step"], "--student"),
        (["--teacher", "T", "--method", "full", "--rank", 4], "--rank"),
        (["--teacher", "T", "--method", "full", "--dtype", "bfloat16"], "float32"),
        (["--teacher", "T", "--method", "full", "--carry", "zoo"], "--carry"),
        (["--student", "S", "--carry", "zoo"], "--carry"),
        (["--teacher", "T", "--prior_steps", 0], "at least 1"),
        (["--teacher", "T", "--method", "dora"], "lorad, lora, full"),
        (["--teacher", "T", "--dtype", "int8"], "float32, bfloat16"),
    ],
)
def test_options_that_contradict(refused, subject_folder, tmp_path, options, told):
    assert told in refused(*short(subject_folder, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be(refused, sd_folder, subject_folder, tmp_path):
    plain = ["--prompt", "sks apple", "--teacher", sd_folder]
    weight = ["--subject", subject_folder, "--out", tmp_path / "out", "--prior_weight", 0.5]
    assert "--prior_prompt" in refused(*plain, *weight)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    assert "exists" in refused(*plain, "--subject", subject_folder, "--out", taken)
    assert (taken / "mine.txt").read_text() == "kept"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no picture" in refused(*plain, "--subject", empty, "--out", tmp_path / "out")
    (empty / "torn.png").write_bytes(b"\x89PNG")
    assert "torn.png" in refused(*plain, "--subject", empty, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
