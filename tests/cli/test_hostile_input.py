"""Hostile input ends in one line that names it: deep or endless YAML, slow patterns, wrong types of numbers, odd paths."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from wadi.analysis.swap import matching
from wadi.backbones import load_pipeline
from wadi.cli.guard import BAD_INPUT, guard
from wadi.cli.main import main
from wadi.distill import checkpoints
from wadi.errors import WadiError
from wadi.extras.lora.training import attach_lora
from wadi.io import patterns
from wadi.io.files import whole_folder
from wadi.io.images import open_image
from wadi.io.yaml_files import check_yaml_size
from wadi.lorad.angles import largest_rank

ENDLESS = r"(\w|\w\w|\.|\w\.)+[#!]"


@pytest.fixture
def error_of(capsys):
    """``error_of(*argv)`` runs a command that must end with one line and code 2, and returns the line."""

    def run(*argv):
        assert main([str(word) for word in argv]) == BAD_INPUT
        line = capsys.readouterr().err
        assert line.startswith("wadi: ")
        assert line.count("\n") == 1
        return line

    return run


# --- YAML that the parser of the command line reads --------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["[" * 100_000, "[" * 70 + "]" * 70, "&a [*a]", '{"a":' * 100_000])
def test_a_value_without_bound_is_an_error(value, error_of):
    """A C parser crashes the process at some ten thousand levels."""
    assert "sample-prompts" in error_of("plan", f"--sample_prompts={value}")


def test_aliases_of_aliases_are_an_error(error_of):
    rows = "".join(f"{'abcdefghi'[i + 1]}: &{'abcdefghi'[i + 1]} [{','.join(['*' + 'abcdefghi'[i]] * 10)}], " for i in range(6))
    assert "sample-prompts" in error_of("plan", "--sample_prompts={a: &a [x, x], " + rows + "}")


def test_text_that_is_not_yaml_stays_text(error_of):
    check_yaml_size("*foo: [", "The value")
    assert "[*" in error_of("distill", "--teacher", "[*", "--prompts", "x", "--out", "y", "--steps", "0", "--dtype", "[*")


def test_a_file_for_a_group_of_settings_is_a_regular_file(error_of, tmp_path):
    (tmp_path / "deep.yaml").write_text('{"a":' * 100_000)
    (tmp_path / "latin.yaml").write_bytes(b"rank: \xe9")
    os.mkfifo(tmp_path / "fifo")
    for name in ("deep.yaml", "latin.yaml", "fifo"):
        assert name in error_of("plan", "--student", tmp_path / name)


def test_a_group_of_settings_is_still_read_from_a_file(sd_folder, tmp_path, capsys):
    (tmp_path / "student.yaml").write_text("rank: 3\nlr: 1e-3\n")
    argv = ["distill", "--teacher", str(sd_folder), "--prompts", "p", "--out", "o", "--dry_run"]
    for flags in (
        ["--student", str(tmp_path / "student.yaml")],
        [f"--student={tmp_path / 'student.yaml'}", "--student.rank=4"],
    ):
        assert main([*argv, *flags]) == 0
        written = yaml.safe_load(capsys.readouterr().out)
        assert written["student"]["lr"] == 1e-3
        assert written["student"]["rank"] == 3 + (len(flags) == 2 and "rank" in flags[1])
    (tmp_path / "student.yaml").write_text("rnak: 3\n")
    assert main([*argv, "--student", str(tmp_path / "student.yaml")]) == BAD_INPUT
    assert "student.rnak" in capsys.readouterr().err


# --- patterns ----------------------------------------------------------------------------------------------------------------


def test_a_pattern_that_never_ends_is_named(sd_folder, monkeypatch):
    monkeypatch.setattr(patterns, "TIME_LIMIT", 0.2)
    network = load_pipeline(sd_folder).unet
    with pytest.raises(WadiError, match="--layers"):
        matching(r"(a|aa)+$")("a" * 60 + "b")
    with pytest.raises(WadiError) as error:
        attach_lora(network, 2, ENDLESS)
    assert repr(ENDLESS) in str(error.value)
    with pytest.raises(WadiError):
        largest_rank(network, ENDLESS)


def test_a_lora_is_put_on_what_its_pattern_matches(sd_folder):
    network = load_pipeline(sd_folder).unet
    attach_lora(network, 2, r".*attn1\.to_q")
    layers = {name.rpartition(".lora_A")[0] for name, _ in network.named_parameters() if ".lora_A" in name}
    assert layers == {name for name, _ in load_pipeline(sd_folder).unet.named_modules() if name.endswith("attn1.to_q")}
    assert layers


# --- numbers of the wrong kind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_adapters_of_integer_or_complex_numbers_are_an_error(kind, finished_run, tmp_path, error_of):
    for folder in (tmp_path / "student", tmp_path / "lora"):
        folder.mkdir()
    for name in ("adapter_config.json", "wadi.json"):
        (tmp_path / "student" / name).write_text((finished_run / "student" / name).read_text())
    tensors = load_file(finished_run / "student/adapter_model.safetensors")
    save_file({name: value.to(kind) for name, value in tensors.items()}, tmp_path / "student/adapter_model.safetensors")
    assert str(kind)[6:] in error_of("generate", "red", "--adapter", tmp_path / "student", "--out", tmp_path / "x.png")
    rows = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 32).to(kind)}
    save_file(rows, tmp_path / "lora.safetensors")
    line = error_of(
        "generate", "red", "--run", finished_run, "--lora", tmp_path / "lora.safetensors", "--out", tmp_path / "x.png"
    )
    assert str(kind)[6:] in line
    assert not (tmp_path / "x.png").exists()


# --- checkpoints whose manifest agrees ---------------------------------------------------------------------------------------


def _none(tensors):
    tensors.clear()


def _flat_moment(tensors):
    name = next(name for name in tensors if name.endswith("exp_avg"))
    tensors[name] = tensors[name].flatten()


def _halves(tensors):
    for name in tensors:
        tensors[name] = tensors[name].half()


def _no_steps(tensors):
    for name in [name for name in tensors if name.endswith(".exp_avg_sq")]:
        del tensors[name]


def _short_generator(tensors):
    tensors["generator"] = tensors["generator"][:10].clone()


@pytest.mark.parametrize("change", [_none, _flat_moment, _halves, _no_steps, _short_generator])
def test_a_checkpoint_with_other_tensors_is_named(change, finished_run, sd_folder, prompts_path, tmp_path):
    import shutil

    from wadi.distill.loop import distill

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (folder,) = (run / "checkpoints").iterdir()
    tensors = load_file(folder / "training.safetensors")
    change(tensors)
    save_file(tensors, folder / "training.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["training.safetensors"] = checkpoints.sha256(folder / "training.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WadiError, match="step-0000003"):
        distill(tiny.settings(sd_folder, prompts_path, run, steps=4, student={"timesteps": [800], "lr": 0.05}))


# --- paths -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP, errno.EIO, errno.EISDIR, errno.EROFS])
def test_a_path_that_the_system_does_not_allow_is_bad_input(number, capsys):
    def act():
        raise OSError(number, os.strerror(number), "/some/place")

    assert guard("wadi eval", act) == BAD_INPUT
    line = capsys.readouterr().err
    assert "/some/place" in line
    assert os.strerror(number) in line


def test_a_folder_with_a_nul_in_its_name_is_an_error(tmp_path):
    with pytest.raises(WadiError, match="out"), whole_folder(Path(f"{tmp_path}/out\0x")):
        pass


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that opens and cannot be read")
def test_an_image_that_opens_and_cannot_be_read():
    with pytest.raises(WadiError, match="/proc/self/mem"):
        open_image("/proc/self/mem")


def test_a_condition_size_that_is_too_large_is_named(tmp_path, error_of):
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    assert "65536" in error_of(
        "control", "condition", tmp_path / "in.png", "--size", "65536x65536", "--out", tmp_path / "x.png"
    )


def test_control_train_checks_its_folder_before_it_generates(sd_folder, prompts_path, tmp_path, error_of):
    (tmp_path / "out").write_text("mine")
    files = ["--teacher", sd_folder, "--prompts", prompts_path, "--out", tmp_path / "out"]
    error_of("control", "train", *files, "--pictures", "1", "--picture_steps", "1", "--steps", "1", "--device", "cpu")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("option", ["--json", "--picture", "--page"])
def test_control_eval_checks_its_files_before_it_loads(option, tmp_path, error_of):
    assert str(tmp_path) in error_of("control", "eval", "--teacher", "./nowhere", option, tmp_path)


# --- caches ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(sd_folder, prompts_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "cache"
    assert (
        main(["embed", "--teacher", str(sd_folder), "--prompts", str(prompts_path), "--out", str(out), "--device", "cpu"]) == 0
    )
    return out


def _float_starts(tensors):
    tensors["text.starts"] = tensors["text.starts"].double()


def _starts_beyond(tensors):
    tensors["prompt_embeds.starts"][-1] += 100


def _backward_starts(tensors):
    tensors["text.starts"] = tensors["text.starts"].flip(0).clone()


def _narrow_rows(tensors):
    tensors["prompt_embeds"] = tensors["prompt_embeds"][:, :5].clone()


def _no_starts(tensors):
    del tensors["prompt_embeds.starts"]


@pytest.mark.parametrize("change", [_float_starts, _starts_beyond, _backward_starts, _narrow_rows, _no_starts])
def test_a_shard_with_other_tensors_is_named(change, cache, tmp_path):
    import shutil

    from safetensors import safe_open

    from wadi.prompts.cache import Embeddings

    shutil.copytree(cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    with safe_open(shard, "pt") as stored:
        header = stored.metadata()
    tensors = load_file(shard)
    assert len(Embeddings(tmp_path / "cache")[0]) > 0
    change(tensors)
    save_file(tensors, shard, header)
    with pytest.raises(WadiError, match="shard-00000"):
        Embeddings(tmp_path / "cache")


# --- configs that are first used late -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("target_modules", [1, 2]), ("target_modules", 5), ("exclude_modules", [None]), ("modules_to_save", -0.5),
        ("modules_to_save", "abc"), ("layers_pattern", [[]]), ("rank_pattern", "abc"), ("task_type", "abc"), ("r", "4"),
    ],
)  # fmt: skip
def test_an_adapter_config_with_a_wrong_type_is_named(setting, value, finished_run, tmp_path, error_of):
    import shutil

    shutil.copytree(finished_run / "student", tmp_path / "student")
    config = tmp_path / "student" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), setting: value}))
    line = error_of("generate", "red", "--adapter", tmp_path / "student", "--out", tmp_path / "x.png")
    assert setting.replace("_", " ") in line.replace("_", " ")
    assert str(tmp_path / "student") in line


def test_a_config_value_that_fails_while_generating_is_one_line(finished_run, tmp_path, error_of):
    assert main(["export", "--run", str(finished_run), "--out", str(tmp_path / "student")]) == 0
    config = tmp_path / "student" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": "abc"}))
    line = error_of("generate", "red", "--run", tmp_path / "student", "--out", tmp_path / "x.png")
    assert "config" in line
    assert not (tmp_path / "x.png").exists()


def test_a_config_whose_step_cannot_be_planned_is_one_line(sd_folder, tmp_path, error_of):
    import shutil

    shutil.copytree(sd_folder, tmp_path / "teacher")
    config = tmp_path / "teacher" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mid_block_scale_factor": "abc"}))
    argv = ["plan", "--teacher", tmp_path / "teacher", "--student.rank", "4", "--fake.rank", "2"]
    assert str(tmp_path / "teacher") in error_of(*argv)


def test_memory_that_runs_out_keeps_its_own_message():
    from wadi.backbones.load_errors import explain_run_errors

    with pytest.raises(torch.OutOfMemoryError), explain_run_errors("It cannot generate"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(WadiError, match="KeyError"), explain_run_errors("It cannot generate"):
        raise KeyError("x")


@pytest.mark.parametrize(("part", "file"), [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_a_pipeline_of_integers_is_an_error(part, file, kind, sd_folder, tmp_path):
    """diffusers and transformers would cast them, so that all weights below 1 become 0."""
    import shutil

    shutil.copytree(sd_folder, tmp_path / "teacher")
    path = tmp_path / "teacher" / part / f"{file}.safetensors"
    save_file({name: value.to(kind) for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(WadiError, match=part):
        load_pipeline(tmp_path / "teacher")


def test_layers_of_8_bit_floats_are_checked():
    from wadi.analysis.analyze import _check_finite

    fine = torch.ones(2, 2).to(torch.float8_e4m3fn)
    _check_finite("layer", fine, fine)
    with pytest.raises(WadiError, match="layer"):
        _check_finite("layer", fine, (torch.ones(2, 2) * torch.nan).to(torch.float8_e4m3fn))


def test_a_condition_for_which_memory_runs_out_says_so(tmp_path, error_of, monkeypatch):
    from wadi.extras.control import conditions

    def full(*_):
        raise torch.OutOfMemoryError("can't allocate memory")

    monkeypatch.setattr(conditions, "condition", full)
    Image.new("RGB", (12, 8)).save(tmp_path / "in.png")
    assert "12 x 8" in error_of("control", "condition", tmp_path / "in.png", "--out", tmp_path / "x.png")


def test_only_a_student_of_the_embedded_teacher_is_shipped(finished_run, sd_folder, tmp_path, error_of):
    assert str(sd_folder) in error_of("zoo", "ship", finished_run, "--weights", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
