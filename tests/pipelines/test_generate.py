"""Images depend on prompt and seed alone, and files are written as they are generated."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from students import one_image, same_image

from wadi.backbones import from_pipeline, load_pipeline
from wadi.errors import WadiError
from wadi.pipelines.compare import compare_with_teacher
from wadi.pipelines.files import MOST_IMAGES, Folder, file_name, generate_file, generate_folder, plan_images
from wadi.pipelines.generate import Sampling, generate_images
from wadi.pipelines.load import load, load_teacher_pipeline


def write_folder(pipeline, prompts, out, batch=8, count=1, seed=0, **folder):
    return generate_folder(pipeline, plan_images(prompts, seed, count), out, Sampling(batch=batch), Folder(**folder))


def write_file(pipeline, prompts, out, batch=8, count=1, seed=0):
    return generate_file(pipeline, plan_images(prompts, seed, count), out, Sampling(batch=batch))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- in memory ----------------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline):
    prompts, seeds = ["red apple", "blue car", "green tree", "red apple", ""], [3, 4, 5, 6, 2**63 - 1]
    alone = [one_image(pipeline, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    for batch in (2, 5):
        together = generate_images(pipeline, prompts, seeds, Sampling(batch=batch)).images
        assert all(same_image(*pair) for pair in zip(alone, together, strict=True))
    assert not same_image(alone[0], alone[3], off=8)  # another seed is another image
    assert same_image(one_image(pipeline, prompts[0], seeds[0]), alone[0], off=0)
    assert len(alone[0].getcolors()) > 1


def test_a_comparison_shows_the_teacher_above_the_student(finished_run, pipeline):
    teacher = load_teacher_pipeline(finished_run)
    result = compare_with_teacher(pipeline, teacher, ["red apple", "blue car"], [1, 2], Sampling(), Sampling(3, 2.0))
    assert result.teacher_ms > 0
    assert result.student_ms > 0
    assert result.image.size[0] > 2 * 16
    assert result.image.size[1] > 2 * 16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_of_nan_or_infinity_is_an_error(value, sd_folder, finished_run, tmp_path):
    pipeline = load(finished_run)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[1] = value
    with pytest.raises(WadiError, match="2 of 2"):
        write_file(pipeline, ["red apple"], tmp_path / "x.png", count=2)
    with pytest.raises(WadiError, match="1 of 1"):
        write_folder(pipeline, ["red apple"], tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    assert "decode" not in vars(pipeline.vae)
    with pytest.raises(WadiError, match="1 of 1"):
        from_pipeline(pipeline).decode(torch.zeros(1, 4, 8, 8))
    backbone = from_pipeline(load_pipeline(sd_folder))
    with pytest.raises(WadiError, match="1 of 2"):
        backbone.decode(torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), value)]))


@pytest.mark.parametrize(
    ("prompts", "seeds", "sampling", "named"),
    [
        ([], [], Sampling(), "0 prompts"),
        (["a", "b"], [1], Sampling(), "1 seeds"),
        (["a"], [-1], Sampling(), "-1"),
        (["a"], [2**63], Sampling(), str(2**63)),
        (["a"], [0], Sampling(batch=0), "batch is 0"),
        (["a"], [0], Sampling(steps=-2), "steps is -2"),
    ],
)
def test_a_request_out_of_range_is_named(prompts, seeds, sampling, named, pipeline):
    with pytest.raises(WadiError, match=named):
        generate_images(pipeline, prompts, seeds, sampling)


@pytest.mark.parametrize(
    ("prompts", "seed", "count", "named"),
    [
        ([], 0, 1, "no prompt"),
        (["a"], 0, 0, "count is 0"),
        (["a"], 0, -2, "count is -2"),
        (["a"] * 2, 0, MOST_IMAGES, "2,000,000"),
        (["a"], -1, 1, "-1"),
        (["a"], 2**63 - 1, 2, str(2**63)),
    ],
)
def test_a_plan_out_of_range_is_named(prompts, seed, count, named):
    with pytest.raises(WadiError, match=named):
        plan_images(prompts, seed, count)


# --- one file -----------------------------------------------------------------------------------------------------------------


def test_one_image_goes_into_the_named_file(pipeline, tmp_path):
    written = write_file(pipeline, ["red apple"], tmp_path / "deep" / "apple.png", seed=7)
    assert written.paths == [tmp_path / "deep" / "apple.png"]
    assert written.ms_per_image > 0
    assert same_image(Image.open(written.paths[0]), one_image(pipeline, seed=7), off=0)


def test_several_images_are_a_grid_and_a_file_each(pipeline, tmp_path):
    paths = write_file(pipeline, ["red apple"], tmp_path / "apple.png", seed=7, count=3, batch=2).paths
    assert [path.name for path in paths] == ["apple-7.png", "apple-8.png", "apple-9.png"]
    width, height = Image.open(paths[0]).size
    grid = Image.open(tmp_path / "apple.png").size
    assert grid[0] > 3 * width
    assert grid[1] > height
    assert len(list(tmp_path.iterdir())) == 4


def test_a_path_below_a_file_is_left_alone(pipeline, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(WadiError, match=str(tmp_path / "taken")):
        write_file(pipeline, ["red apple"], tmp_path / "taken" / "apple.png")
    assert content(tmp_path) == {"taken": b"mine"}


# --- a folder -----------------------------------------------------------------------------------------------------------------


def test_a_folder_has_a_file_for_each_image_and_a_manifest(pipeline, tmp_path):
    prompts = ["Red Apple!", "../../etc/passwd", "日本", "x" * 300]
    paths = write_folder(pipeline, prompts, tmp_path / "out", seed=5, count=2, batch=3).paths
    names = [path.name for path in paths]
    assert names[:5] == [
        "00000-red-apple-5.png", "00001-red-apple-6.png", "00002-etc-passwd-7.png", "00003-etc-passwd-8.png",
        "00004-prompt-9.png",
    ]  # fmt: skip
    assert {path.parent for path in paths} == {tmp_path / "out"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "images.jsonl"])
    assert all(len(name) < 100 for name in names)
    assert len(set(names)) == 8
    assert file_name(3, "a", 0) == "00003-a-0.png"


class Stop(Exception):
    pass


def stop_after(pipeline, calls, monkeypatch):
    """Let the pipeline's autoencoder raise when it decodes batch ``calls + 1``."""
    plain, decoded = pipeline.vae.decode, []

    def decode(*args, **kwargs):
        decoded.append(1)
        if len(decoded) > calls:
            raise Stop
        return plain(*args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "decode", decode)


def test_the_same_call_continues_an_interrupted_one(pipeline, tmp_path, monkeypatch):
    prompts, out = ["red apple", "blue car", "green tree", "yellow sun", "a cat"], tmp_path / "out"
    complete = tmp_path / "complete"
    write_folder(pipeline, prompts, complete, batch=2)
    with monkeypatch.context() as patch:
        stop_after(pipeline, 2, patch)
        with pytest.raises(Stop):
            write_folder(pipeline, prompts, out, batch=2)
    names = [f"0000{i}-{words}-{i}.png" for i, words in enumerate(["red-apple", "blue-car", "green-tree", "yellow-sun"])]
    assert sorted(path.name for path in out.glob("*.png")) == names
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    written = write_folder(pipeline, prompts, out, batch=3)
    assert written.existing == 4
    assert {name: (out / name).stat().st_mtime_ns for name in names} == before
    for path in complete.glob("*.png"):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(out / path.name)))
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines] == [
        (path.name, prompt, seed) for path, prompt, seed in zip(written.paths, prompts, range(5), strict=True)
    ]
    assert write_folder(pipeline, prompts, out).existing == 5
    assert write_folder(pipeline, [*prompts, "a dog"], out).existing == 5


def test_a_truncated_or_missing_image_is_generated_again(pipeline, tmp_path):
    prompts = ["red apple", "blue car"]
    first, second = write_folder(pipeline, prompts, tmp_path).paths
    data = second.read_bytes()
    second.unlink()
    with open(tmp_path / "images.jsonl", "a") as stream:
        stream.write('{"file": "00002-')  # left by a process that was killed while it wrote
    assert write_folder(pipeline, prompts, tmp_path).existing == 1
    assert second.read_bytes() == data
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert {line["file"] for line in lines} == {first.name, second.name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"prompts": ["Red apple!", "blue car"]}, "red apple"),
        ({}, "00000-red-apple-0.png"),
    ],
    ids=["settings", "prompt", "file"],
)
def test_an_image_made_in_another_way_is_replaced_only_with_overwrite(change, named, pipeline, tmp_path):
    arguments = {"prompts": ["red apple", "blue car"], "out": tmp_path, "settings": {"dtype": "float32"}}
    path = write_folder(pipeline, **arguments).paths[0]
    if not change:
        Image.new("RGB", (16, 16), "red").save(path)
    before = content(tmp_path)
    with pytest.raises(WadiError, match=named):
        write_folder(pipeline, **arguments | change)
    assert content(tmp_path) == before
    assert write_folder(pipeline, **arguments | change, overwrite=True).existing == (0 if "settings" in change else 1)
    assert write_folder(pipeline, **arguments | change).existing == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("00000-red-apple-0.png", "mine"),
        *(("images.jsonl", text) for text in ("notes\n", "[]\n", '{"file": 3}\n', "[" * 5000 + "\n")),
    ],
)
def test_a_file_of_the_user_is_left_alone(name, text, pipeline, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(WadiError, match=name):
        write_folder(pipeline, ["red apple"], tmp_path)
    assert content(tmp_path) == {name: text.encode()}
