"""The command line: bad input is one line and exit code 2, and nothing saved before is lost."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import tiny
from wadi.cli.distill import add_options, prepare
from wadi.cli.main import main
from wadi.cli.parser import Command
from wadi.cli.settings import config_from
from wadi.distill import loop
from wadi.distill.config_files import from_dict
from wadi.distill.objectives import with_defaults
from wadi.distill.presets import preset


@pytest.fixture
def error_of(capsys):
    """Run a command that must end with code 2 and one line on stderr, apart from the progress of a run; return the line."""

    def run(*argv, progress=False):
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert code == 2, err
        assert "Traceback" not in err
        assert out == ""
        errors = [line for line in lines if line.startswith("wadi: ")]
        assert len(errors) == 1, err
        assert progress or lines == errors, err
        return errors[0]

    return run


def short(teacher, prompts, out, **changes):
    """A distillation of a few steps as a command line."""
    values = {
        "teacher": teacher, "prompts": prompts, "out": out, "steps": 2, "batch": 2, "student.rank": 2, "fake.rank": 2,
        "sample_seeds": 1, "teacher_steps": 1, "sample_prompts": '["red apple"]', "device": "cpu", **changes,
    }  # fmt: skip
    return ["distill", *(f"--{name}={value}" for name, value in values.items())]


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- commands -----------------------------------------------------------------------------------------------------------------


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in ("distill", "generate", "export", "report", "zoo"))
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert "wadi 0." in capsys.readouterr().out


def test_preset_then_file_then_flags(tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("steps: 11\nbatch: 7\nstudent: {rank: 9, lr: 1e-5}\n")
    second.write_text(yaml.safe_dump({"batch": 5}))
    argv = ["--config", str(first), "--steps", "3", "--preset=demo", "--out", "runs/x", "--student.ema", "0.5"]
    argv += ["--config", str(second)]  # flags win, also over a file named after them
    config = config_from(Command("", add_options, lambda _: 0, prepare).read("distill", argv).options)
    demo = preset("demo")
    student = dataclasses.replace(demo.student, rank=9, lr=1e-5, ema=0.5)
    assert config == dataclasses.replace(demo, out="runs/x", batch=5, steps=3, student=student)


def test_a_dry_run_prints_the_settings_and_writes_nothing(capsys, tmp_path):
    assert (
        main(["distill", "--preset", "sd15", "--teacher", "t", "--prompts", "p", "--out", str(tmp_path / "x"), "--dry-run"])
        == 0
    )
    printed = from_dict(yaml.safe_load(capsys.readouterr().out))
    expected = dataclasses.replace(preset("sd15"), teacher="t", prompts="p", out=str(tmp_path / "x"))
    assert printed == with_defaults(expected)
    assert (printed.fake.guidance_scale, printed.fake.updates, printed.fake.weighting) == (1.5, 1, "alpha2")
    assert list(tmp_path.iterdir()) == []


def test_from_prompts_to_images(sd_folder, prompts_path, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(short(sd_folder, prompts_path, run)) == 0
    out = capsys.readouterr().out
    assert str(run / "samples" / "step-0000002.png") in out
    assert str(run / "report.html") in out
    assert (run / "report.html").is_file()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()

    target = tmp_path / "apple.png"
    assert main(["generate", "red apple", "--run", str(run), "--out", str(target), "--seed", "7"]) == 0
    assert Image.open(target).size == (16, 16)
    assert "ms" in capsys.readouterr().out
    folder = tmp_path / "images"
    assert main(["generate", "--prompts", str(prompts_path), "--run", str(run), "--out", str(folder), "--batch", "3"]) == 0
    assert len(list(folder.glob("*.png"))) == 4
    compared = tmp_path / "compared.png"
    assert (
        main(["generate", "a", "--run", str(run), "--out", str(compared), "--compare", "--teacher-steps=2", "--count=2"]) == 0
    )
    assert Image.open(compared).size[0] > 32


def test_the_exit_code_names_the_signal_of_a_stop(sd_folder, prompts_path, tmp_path, capsys, monkeypatch):
    plain, command = loop.train_step, short(sd_folder, prompts_path, tmp_path / "run", steps=3)

    def train_step(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        assert main(command) == 128 + signal.SIGTERM
    assert "Stopped at step 1 of 3" in capsys.readouterr().err
    assert main(command) == 0
    assert "from step 1 of 3" in capsys.readouterr().err


# --- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["distil"], ("'distil'",)),
        (["distill", "--out", "x", "--prompts", "y"], ("--teacher",)),
        (["distill", "--preset", "huge"], ("'huge'", "demo")),
        (["distill", "--preset"], ("--preset",)),
        (["distill", "--stdent.rank", "3"], ("stdent",)),
        (["distill", "--steps", "many"], ("--steps", "many", "int")),
        (["distill", "--student.rank", "1.5"], ("--student.rank", "1.5")),
        (["distill", "--student.timesteps", "late"], ("--student.timesteps", "late")),
        (["distill", "--student.rank", "0"], ("student.rank", "0")),
        (["distill", "--fake.rank", "-3"], ("fake.rank", "-3")),
        (["distill", "--t-range", "[0.9, 0.1]"], ("0.9, 0.1",)),
        (["distill", "--seed", "-1"], ("seed", "-1")),
        (["distill", "--dtype", "float8"], ("dtype", "float8")),
        (["distill", "--config", "/nowhere.yaml"], ("nowhere.yaml",)),
        (["generate"], ("prompt",)),
        (["generate", "apple", "--prompts", "p.txt"], ("both",)),
        (["generate", "", "--prompts", "p.txt"], ("both",)),
        (["generate", "apple", "--seed", "x"], ("seed",)),
        (["generate", "apple", "--device", "toaster"], ("toaster",)),
        (["generate", "apple", "--dtype", "int8"], ("int8",)),
        (["generate", "apple", "--run", "/nowhere"], ("/nowhere",)),
        (["generate", "apple", "--run", "/nowhere", "--adapter", "/nowhere"], ("--run", "--adapter")),
        (["generate", "apple", "--adapter", "/nowhere"], ("/nowhere",)),
        (["generate", "--prompts", "/nowhere.txt"], ("/nowhere.txt",)),
        (["export", "--run", "/nowhere"], ("out",)),
        (["export", "--run", "/nowhere", "--out", "/tmp"], ("'/tmp'",)),
        (["report", "/nowhere"], ("/nowhere",)),
        (["report"], ("run",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_code_2(argv, words, error_of):
    line = error_of(*argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("content", [None, b"\n \n", b"\x89PNG\xff"])
def test_a_bad_prompts_file_is_named_and_nothing_is_written(content, sd_folder, tmp_path, error_of):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    assert str(tmp_path / "p.txt") in error_of(*short(sd_folder, tmp_path / "p.txt", tmp_path / "run"))
    assert str(tmp_path / "p.txt") in error_of("generate", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_not_a_pipeline_is_named(prompts_path, sd_folder, tmp_path, error_of):
    (tmp_path / "empty").mkdir()
    hollow = shutil.copytree(sd_folder, tmp_path / "hollow")
    shutil.rmtree(hollow / "unet")
    for teacher in (tmp_path / "nowhere", tmp_path / "empty", prompts_path, hollow, "owner/name"):
        assert str(teacher) in error_of(*short(teacher, prompts_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_continues_after_its_teacher_and_prompts_moved(sd_folder, prompts_path, tmp_path, capsys, monkeypatch, error_of):
    """Contents count, not names; other contents are an error."""
    teacher, prompts = shutil.copytree(sd_folder, tmp_path / "teacher"), shutil.copy(prompts_path, tmp_path / "p.txt")
    monkeypatch.chdir(tmp_path)
    assert main(short(teacher, "p.txt", "run")) == 0
    assert main(short("teacher", "./p.txt", "run", steps=3)) == 0
    moved, elsewhere = shutil.move(teacher, tmp_path / "moved"), shutil.move(prompts, tmp_path / "q.txt")
    assert main(short(moved, elsewhere, "run", steps=4)) == 0
    assert "from step 3 of 4" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["teacher"] == str(moved)
    assert main(["generate", "red apple", "--run", "run", "--out", "a.png"]) == 0
    capsys.readouterr()
    (tmp_path / "q.txt").write_text("another\n")
    assert "prompts" in error_of(*short(moved, "q.txt", "run", steps=5), progress=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"teacher: caf\xe9", ("0xe9",)),
        (b"steps: [unclosed", ()),
        (b"\x00\xff", ()),
        (b"stepz: 3", ("stepz", "steps")),
        (b"a: &a [*a]", ()),
        (b"[" * 100_000, ()),
        (b"steps: " + b"9" * 5000, ()),
        (b"resolution: [16]", ("resolution", "[16]")),
        (b"stdent: {rank: 3}", ("stdent", "student")),
        (b"student: {rnk: 3}", ("student.rnk", "student.rank")),
        (b"student: 3", ("student", "3")),
        (b"student: {lr: .nan}", ("student.lr", "nan")),
        (b"preset: demo", ("preset",)),
        (b"- 1", ("list",)),
        (None, ()),
    ],
)
def test_an_error_in_a_config_file_names_the_file_and_the_setting(content, words, tmp_path, error_of):
    path = tmp_path / "c.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    for command in (["distill", "--dry-run"], ["plan"]):
        line = error_of(*command, "--preset=demo", "--out=x", "--config", path)
        assert all(word in line for word in words), line
        assert str(path) in line or "nan" in words


@pytest.mark.parametrize(
    "argv",
    [
        ["distill", "--student.lr", ".inf"], ["distill", "--guidance_scale", ".nan"], ["distill", "--student.rank=1000000"],
        ["distill", "--batch", "9" * 5000], ["distill", "--resolution", "[16]"], ["distill", "--sample_prompts", "[" * 5000],
        ["plan", "--processes=0"], ["plan", "--processes=-1"], ["plan", "--processes=1e9"],
        ["extract", "a", "b", "--out=c", "--rank=1000000"], ["extract", "a", "b", "--out=c", "--timestep=0"],
        ["embed", "--teacher=zoo", "--prompts=zoo", "--out=c", "--batch=0"],
        ["embed", "--teacher=zoo", "--prompts=zoo", "--out=c", "--limit=-1"],
        ["embed", "--teacher=zoo", "--prompts=zoo", "--out=c", "--shard_rows=99999999999"],
        ["embed", "--teacher=zoo", "--prompts=zoo", "--out=c", "--resolution", "64", "0"],
        ["analyze", "zoo", "zoo", "--out=c", "--exact_up_to=-1"],
        ["analyze", "zoo", "zoo", "--out=c", "--swap_eval", "--count=0"],
        ["analyze", "zoo", "zoo", "--out=c", "--swap_eval", "--steps=1001"],
        ["analyze", "zoo", "zoo", "--out=c", "--swap_eval", "--guidance_scale=nan"],
        ["analyze", "zoo", "zoo", "--out=c", "--swap_eval", "--draw_batch=0"],
        ["control", "eval", "--count=1"], ["control", "eval", "--sets=100000"], ["control", "eval", "--steps=1001"],
        ["control", "eval", "--strengths", "1", "inf"], ["control", "eval", "--guidance_scale=inf"],
        ["control", "train", "--batch=0"], ["control", "train", "--lr=nan"],
        ["zoo", "train", "--threads=-1"], ["zoo", "train", "--minutes_teacher=inf"], ["zoo", "train", "--seed=-1"],
        ["zoo", "train", "--batch_teacher=9999999"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_number_out_of_bounds_is_named_before_anything_is_loaded(argv, error_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = next(word.lstrip("-").partition("=")[0] for word in reversed(argv) if word.startswith("--"))
    more = ["--teacher=t", "--prompts=p", "--out=o"] if argv[0] in ("distill", "plan") else []
    line = error_of(*argv, *more)
    assert option.rpartition(".")[2].replace("_", "-") in line.replace("_", "-")
    assert len(line) < 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"batch": 65536, "resolution": "[65536, 65536]"}, {"warm_start.pairs": 10_000_000, "resolution": "[4096, 4096]"}],
)
def test_sizes_that_cannot_fit_are_reported_with_their_bytes(changes, sd_folder, prompts_path, tmp_path, error_of):
    line = error_of(*short(sd_folder, prompts_path, tmp_path / "run", **changes))
    assert next(iter(changes)) in line
    assert int(re.search(r"([\d,]+) bytes", line)[1].replace(",", "")) > 2**40
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["analyze", "zoo", "zoo", "--out=c", "--by_kind"], ("--by-kind", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--prompts=p"], ("--prompts", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--count=3"], ("--count", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--metrics=fd"], ("--metrics", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--steps=25"], ("--steps", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--guidance_scale=2"], ("--guidance-scale", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--draw_batch=2"], ("--draw-batch", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--pictures=x"], ("--pictures", "--swap-eval")),
        (["analyze", "zoo", "zoo", "--out=c", "--swap_eval", "--prompts=p"], ("prompts", "zoo")),
        (["control", "train", "--edge_weight=1"], ("--edge-weight", "--student")),
        (["control", "train", "--keep_weight=1"], ("--keep-weight", "--student")),
        (["control", "train", "--picture_weight", "1"], ("--picture-weight", "--student")),
        (["control", "train", "--start=zoo", "--slim=false"], ("--slim", "--start")),
        (["embed", "--teacher=zoo", "--prompts=zoo", "--out=c", "--prompts_field=x"], ("--prompts-field", "'x'")),
        (["distill", "--preset=demo", "--out=c", "--prompts_field=x"], ("--prompts-field", "'x'")),
        (["distill", "--preset=sd15", "--teacher=t", "--prompts=p", "--out=c", "--warm_start.weight=1"], ("weight", "pairs")),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_an_option_without_effect_is_named(argv, words, error_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_of(*argv)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_config(finished_run, tmp_path, error_of):
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = everything_in(run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    line = error_of(*short(settings["teacher"], settings["prompts"], run))
    assert "student.rank: 4 -> 2" in line
    assert everything_in(run) == before


def test_no_checkpoint_is_intact(finished_run, tmp_path, error_of):
    run = shutil.copytree(finished_run, tmp_path / "run")
    file = run / "checkpoints" / "step-0000003" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    student = everything_in(run / "student")
    line = error_of("distill", "--config", run / "config.yaml", "--out", run)
    assert "training.safetensors" in line
    assert everything_in(run / "student") == student


def test_an_adapter_of_another_architecture(finished_run, tmp_path, error_of, capsys):
    other = tmp_path / "other"
    tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 16)).save_pretrained(other)
    capsys.readouterr()  # the library's bar over the files it writes
    line = error_of("generate", "apple", "--adapter", finished_run / "student", "--teacher", other)
    assert str(finished_run / "student") in line
    assert ".lorad_" in line


def test_numbers_out_of_range(finished_run, tmp_path, error_of):
    out = tmp_path / "x.png"
    for flags in (["--seed", "-1"], ["--seed", str(2**63)], ["--count", "0"], ["--count", "-1"], ["--batch", "0"]):
        line = error_of("generate", "apple", "--run", finished_run, "--out", out, *flags)
        assert all(word in line for word in flags)
    for flags in (["--count", "0"], ["--teacher-steps", "0"], ["--steps", "0"]):
        line = error_of("generate", "apple", "--run", finished_run, "--out", out, "--compare", *flags)
        assert all(word in line for word in flags)
    assert not out.exists()


def test_a_path_that_cannot_be_written_is_named_and_left_alone(finished_run, sd_folder, prompts_path, tmp_path, error_of):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    taken = tmp_path / "taken"
    for argv in (
        ("generate", "apple", "--run", finished_run, "--out", taken / "apple.png"),
        ("generate", "apple", "--run", finished_run, "--out", tmp_path / "folder"),
        ("export", "--run", finished_run, "--out", taken / "export"),
        short(sd_folder, prompts_path, taken / "run"),
        short(sd_folder, prompts_path, taken),
    ):
        line = error_of(*argv)
        assert str(taken) in line or str(tmp_path / "folder") in line
    assert (tmp_path / "taken").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_run_stops_after_skipping_too_many_steps(sd_folder, prompts_path, tmp_path, error_of):
    command = short(sd_folder, prompts_path, tmp_path / "run", steps=30, max_skipped=2, **{"fake.lr": 1e25})
    line = error_of(*command, progress=True)
    assert "fake" in line
    assert "2" in line


def test_a_full_disk(finished_run, tmp_path, error_of, full_disk):
    with full_disk(1_000):
        line = error_of("export", "--run", finished_run, "--out", tmp_path / "export", progress=True)
        assert str(tmp_path / "export") in line
        line = error_of("generate", "apple", "--run", finished_run, "--out", tmp_path / "a.png", "--count", 8)
        assert str(tmp_path) in line
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert not (tmp_path / "a.png").exists()


def test_an_error_is_one_line_in_a_fresh_process(sd_folder, prompts_path, tmp_path):
    """Also when the libraries print something while they are imported."""
    hollow = shutil.copytree(sd_folder, tmp_path / "hollow")
    shutil.rmtree(hollow / "vae")
    command = [sys.executable, "-m", "wadi", *map(str, short(hollow, prompts_path, tmp_path / "run"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("wadi: ")
    assert str(hollow) in line


def test_the_embedded_student_generates_in_a_fresh_process(tmp_path):
    image = tmp_path / "apple.png"
    command = [sys.executable, "-m", "wadi", "generate", "red apple", "--out", str(image), "--seed", "7", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(image).size == (64, 64)
    assert main(["generate", "red apple", "--out", str(tmp_path / "again.png"), "--seed", "7", "--device", "cpu"]) == 0
    first, again = (np.asarray(Image.open(path)).astype(int) for path in (image, tmp_path / "again.png"))
    assert abs(first - again).max() <= 1  # threads may round otherwise
