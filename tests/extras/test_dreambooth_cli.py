"""``wadi dreambooth``: one command from a folder of images to an adapter, and one line for every error."""

import json

import numpy as np
import pytest
from PIL import Image

from raising import raises_naming
from wadi.cli.main import main
from wadi.diffusion.schedulers import one_step_scheduler


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    for i in range(2):
        Image.fromarray(np.full((16, 16, 3), 60 + 90 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def error_of(capsys):
    """Run the command and return its error, after checking that it is one line and the exit code 2."""

    def run(*argv):
        capsys.readouterr()  # output of the test itself
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
    prior = ["--prior-prompt", "red apple", "blue car", "--prior-count", 3, "--prior-steps", 2]
    return [str(word) for word in (*shared, *prior, *more)]


@pytest.mark.parametrize("method", ["lorad", "lora", "full"])
def test_teacher_to_student_by_command(sd_folder, finished_run, subject_folder, tmp_path, capsys, method):
    out = tmp_path / "apple"
    carry = [] if method == "full" else ["--carry", finished_run]
    rank = [] if method == "full" else ["--rank", 2]
    assert main(["dreambooth", *short(subject_folder, out, "--teacher", sd_folder, "--method", method, *carry, *rank)]) == 0
    output = capsys.readouterr().out
    about = json.loads((out / "wadi.json").read_text())["dreambooth"]
    assert (about["prompt"], about["prior_prompt"], about["method"]) == ("sks apple", ["red apple", "blue car"], method)
    assert f"{about['parameters']:,} numbers trained" in output
    standard = {"lorad": "adapter_config.json", "lora": "pytorch_lora_weights.safetensors", "full": "model_index.json"}[method]
    assert (out / standard).is_file()
    picture = Image.open(out / "picture.png")
    rows = {"full": 3}.get(method, 4)
    assert picture.height > rows * 128
    assert "wadi generate" in output


def test_the_student_itself(finished_run, subject_folder, tmp_path, capsys):
    out = tmp_path / "apple"
    argv = short(subject_folder, out, "--student", finished_run, "--rank", 2, "--picture", "false")
    assert main(["dreambooth", *argv]) == 0
    assert json.loads((out / "wadi.json").read_text())["dreambooth"]["loss"] == "one-step"
    assert not (out / "picture.png").exists()
    assert f"--run {finished_run}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--teacher", "T", "--student", "S"], "both"),
        ([], "neither"),
        (["--teacher", "T", "--loss", "one-step"], "--student"),
        (["--teacher", "T", "--method", "full", "--rank", 4], "--rank"),
        (["--teacher", "T", "--method", "full", "--dtype", "bfloat16"], "float32"),
        (["--teacher", "T", "--method", "full", "--carry", "zoo"], "--carry"),
        (["--student", "S", "--carry", "zoo"], "--carry"),
        (["--teacher", "T", "--prior-steps", 0], "prior-steps"),
        (["--teacher", "T", "--prior-steps", 1001], "1001"),
        (["--teacher", "T", "--prior-count", 0], "prior-count"),
        (["--teacher", "T", "--prior-weight", "nan"], "nan"),
        (["--teacher", "T", "--lr", "inf"], "inf"),
        (["--teacher", "T", "--lr", 0], "lr"),
        (["--teacher", "T", "--rank", 10**6], "1000000"),
        (["--teacher", "T", "--steps", -3], "-3"),
        (["--teacher", "T", "--batch", 0], "batch"),
        (["--teacher", "T", "--seed", -1], "seed"),
        (["--teacher", "T", "--guidance-scale", "nan"], "nan"),
        (["--teacher", "T", "--carry", "/nowhere"], "/nowhere"),
        (["--teacher", "T", "--method", "dora"], "lorad, lora, full"),
        (["--teacher", "T", "--dtype", "int8"], "float32, bfloat16"),
    ],
)
def test_options_that_contradict_or_are_out_of_range(error_of, subject_folder, tmp_path, options, named):
    assert named in error_of(*short(subject_folder, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_bad_options_and_folders_write_nothing(error_of, sd_folder, subject_folder, tmp_path):
    plain = ["--prompt", "sks apple", "--teacher", sd_folder]
    weight = ["--subject", subject_folder, "--out", tmp_path / "out", "--prior-weight", 0.5]
    assert "--prior-prompt" in error_of(*plain, *weight)
    assert "--prior-count" in error_of(*plain, *weight[:-2], "--prior-count", 5)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    assert "exists" in error_of(*plain, "--subject", subject_folder, "--out", taken)
    assert (taken / "mine.txt").read_text() == "kept"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in error_of(*plain, "--subject", empty, "--out", tmp_path / "out")
    (empty / "notes.txt").write_text("not an image")
    assert str(empty) in error_of(*plain, "--subject", empty, "--out", tmp_path / "out")
    assert "notes.txt" in error_of(*plain, "--subject", empty / "notes.txt", "--out", tmp_path / "out")
    (empty / "torn.png").write_bytes(b"\x89PNG")
    assert "torn.png" in error_of(*plain, "--subject", empty, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_one_step_model_cannot_be_the_teacher(error_of, sd_folder, subject_folder, tmp_path):
    from wadi.backbones import load_pipeline

    pipeline = load_pipeline(sd_folder)
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 700)
    pipeline.save_pretrained(tmp_path / "export")
    assert "distilled" in error_of(*short(subject_folder, tmp_path / "out", "--teacher", tmp_path / "export"))
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(error_of, subject_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("wadi.backbones.load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "taken").write_text("mine")
    assert "taken" in error_of(*short(subject_folder, tmp_path / "taken" / "out", "--teacher", "zoo"))
    torn = tmp_path / "subject"
    torn.mkdir()
    (torn / "torn.png").write_bytes(b"not an image")
    assert "torn.png" in error_of(*short(torn, tmp_path / "out", "--teacher", "zoo"))


def test_more_steps_than_the_schedule_has(error_of, sd_folder, subject_folder, tmp_path):
    from diffusers import DDIMScheduler

    from wadi.backbones import load_pipeline

    pipeline = load_pipeline(sd_folder)
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=50, clip_sample=False)
    pipeline.save_pretrained(tmp_path / "short")
    argv = short(subject_folder, tmp_path / "out", "--teacher", tmp_path / "short")
    argv[argv.index("--prior-steps") + 1] = "51"
    message = error_of(*argv)
    assert "51" in message
    assert "50" in message


def test_one_image_is_enough(sd_folder, tmp_path):
    folder = tmp_path / "subject"
    folder.mkdir()
    Image.new("RGB", (20, 30), "red").save(folder / "one.jpg")
    (folder / "notes.txt").write_text("left out")
    argv = short(folder, tmp_path / "out", "--teacher", sd_folder, "--rank", 2, "--picture", "false")
    assert main(["dreambooth", *argv]) == 0


def test_a_schedule_of_a_single_step_has_no_diffusion_loss(sd_folder, subject_folder, tmp_path):
    from diffusers import DDIMScheduler

    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.extras.dreambooth.config import DreamboothConfig
    from wadi.extras.dreambooth.training import check_schedule

    pipeline = load_pipeline(sd_folder)
    check_schedule(from_pipeline(pipeline), DreamboothConfig(loss="diffusion"))
    pipeline.scheduler = DDIMScheduler(trained_betas=[0.0] * 999 + [1 - 0.0047], timestep_spacing="trailing")
    check_schedule(from_pipeline(pipeline), DreamboothConfig(loss="one-step"))
    with raises_naming("timestep 1"):
        check_schedule(from_pipeline(pipeline), DreamboothConfig(loss="diffusion"))
