"""Generated images of a protocol: each depends only on its prompt and seed, and generation can be interrupted."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluate_toys import folder_of
from PIL import Image

import tiny
from processes import finish, start
from raising import raises_naming
from wadi.backbones import from_pipeline, registry
from wadi.backbones.sd import StableDiffusion
from wadi.evaluate import generated
from wadi.evaluate.generated import file_name, generate_missing, read_about
from wadi.evaluate.generators import Source, find, require_same_family
from wadi.evaluate.pairs import read_pairs
from wadi.evaluate.result import read_result
from wadi.io.grids import to_pil
from wadi.pipelines import generate, load
from wadi.sampling import noise, one_step

PROMPTS = ["red apple", "blue car", "green tree", "yellow sun", "red car"]
SEEDS = [1_000_000 + i for i in range(5)]


@pytest.fixture
def student(finished_run):
    return find(str(finished_run)).plain()


def pixels(folder):
    return [np.asarray(Image.open(folder / file_name(i))).astype(int) for i in range(len(PROMPTS))]


def test_images_are_those_of_the_generate_command(student, finished_run, tmp_path):
    assert generate_missing(student, PROMPTS, SEEDS, tmp_path / "all", batch=5) == 5
    alone = [generate.generate_images(load.load(finished_run), [PROMPTS[i]], [SEEDS[i]]).images[0] for i in (0, 3)]
    found = pixels(tmp_path / "all")
    for i, picture in zip((0, 3), alone, strict=True):
        assert np.abs(found[i] - np.asarray(picture).astype(int)).max() <= 1  # a batch may round a pixel otherwise
    assert np.abs(found[0] - found[3]).max() > 8


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_batch_does_not_enter(student, tmp_path, batch):
    generate_missing(student, PROMPTS, SEEDS, tmp_path / "five", batch=5)
    generate_missing(student, PROMPTS, SEEDS, tmp_path / "few", batch=batch)
    assert max(np.abs(a - b).max() for a, b in zip(pixels(tmp_path / "five"), pixels(tmp_path / "few"), strict=True)) <= 1


def test_only_missing_images_are_generated(student, tmp_path):
    folder = tmp_path / "set"
    generate_missing(student, PROMPTS, SEEDS, folder, batch=1)
    before = {i: (folder / file_name(i)).stat().st_mtime_ns for i in range(5)}
    content = (folder / file_name(2)).read_bytes()
    (folder / file_name(2)).unlink()
    assert generate_missing(student, PROMPTS, SEEDS, folder, batch=1) == 1
    assert (folder / file_name(2)).read_bytes() == content
    after = {i: (folder / file_name(i)).stat().st_mtime_ns for i in range(5)}
    assert {i for i in range(5) if before[i] != after[i]} == {2}
    assert generate_missing(student, PROMPTS, SEEDS, folder) == 0


def test_an_interruption_leaves_only_complete_images(student, tmp_path, monkeypatch):
    plain, calls = generated.generate_images, []

    def draw(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments, **keywords)

    monkeypatch.setattr(generated, "generate_images", draw)
    with pytest.raises(KeyboardInterrupt):
        generate_missing(student, PROMPTS, SEEDS, tmp_path / "set", batch=1)
    assert sorted(path.name for path in (tmp_path / "set").glob("*.png")) == [file_name(0), file_name(1)]
    assert generate_missing(student, PROMPTS, SEEDS, tmp_path / "set", batch=1) == 3


def test_a_full_disk_leaves_no_incomplete_image(student, tmp_path, full_disk):
    folder = tmp_path / "set"
    generate_missing(student, PROMPTS[:1], SEEDS[:1], folder)
    (folder / file_name(0)).unlink()
    with full_disk(50), raises_naming(file_name(0)):
        generate_missing(student, PROMPTS[:1], SEEDS[:1], folder)
    assert not list(folder.glob("*.png"))


def test_a_folder_with_other_settings_is_an_error(student, finished_run, tmp_path):
    folder = tmp_path / "set"
    generate_missing(student, PROMPTS, SEEDS, folder)
    with raises_naming(folder, "prompts.count: 5 -> 4"):
        generate_missing(student, PROMPTS[:4], SEEDS[:4], folder)
    with raises_naming(folder, "seeds: "):
        generate_missing(student, PROMPTS, [seed + 1 for seed in SEEDS], folder)
    teacher = find(str(finished_run)).many_steps(2, 3.0)
    with raises_naming(folder, "generator.kind: 'student' -> 'teacher'"):
        generate_missing(teacher, PROMPTS, SEEDS, folder)
    (folder / generated.ABOUT).write_text("{")
    with raises_naming(folder / "pictures.json"):
        generate_missing(student, PROMPTS, SEEDS, folder)


def test_the_folder_tells_prompts_and_generator(student, tmp_path):
    generate_missing(student, PROMPTS, SEEDS, tmp_path / "set")
    assert read_pairs(tmp_path / "set" / "prompts.jsonl") == [(file_name(i), prompt) for i, prompt in enumerate(PROMPTS)]
    assert read_about(tmp_path / "set")["generator"] == json.loads(json.dumps(student.about))
    assert read_about(tmp_path) is None


def shared_eval(run, prompts, reference, place, index):
    """Run ``wadi eval`` as each process of ``accelerate launch`` does, and record how many images it generated."""
    from wadi.cli.main import main

    plain, mine = generated.generate_missing, []
    generated.generate_missing = lambda *arguments: mine.append(plain(*arguments))
    code = main(
        ["eval", str(run), "--protocol", str(prompts), "--reference", str(reference), "--metrics", "fd", "--features", "zoo",
         "--pictures", str(place / "pictures"), "--out", str(place / "result.json"), "--device", "cpu", "--draw_batch", "1"]
    )  # fmt: skip
    (place / f"drew-{index}.txt").write_text(str(sum(mine)))
    return code


def test_processes_share_and_change_nothing(finished_run, tmp_path, monkeypatch):
    """The same files byte by byte and the same result, whoever drew what; each process drew some, the first one measured."""
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    reference = folder_of(tmp_path / "reference", 4)
    for count in (1, 2):
        place = tmp_path / str(count)
        place.mkdir()
        started = start(
            count, shared_eval, finished_run, tmp_path / "prompts.txt", reference, place, log=tmp_path / f"log{count}"
        )
        assert finish(started) == [0] * count, (tmp_path / f"log{count}-0").read_text()
    one, two = (sorted((tmp_path / str(count) / "pictures").rglob("*.png")) for count in (1, 2))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert len(one) == len(PROMPTS)
    assert [(tmp_path / "2" / f"drew-{i}.txt").read_text() for i in (0, 1)] == ["3", "2"]
    results = [read_result(tmp_path / str(count) / "result.json") for count in (1, 2)]
    assert results[0].rows == results[1].rows
    assert results[0].hash == results[1].hash


def test_the_key_of_a_generator_depends_on_all_that_its_images_depend_on(finished_run, sd_folder):
    source = find(str(finished_run))
    student, teacher = source.plain(), source.many_steps(2, 3.0)
    assert student.key == find(str(finished_run)).plain().key
    assert student.about["adapter"] != student.about["teacher"] == teacher.about["weights"]
    others = [source.many_steps(2, 2.5), source.many_steps(3, 3.0), source.undistilled(800), source.undistilled(999)]
    assert len({generator.key for generator in (student, teacher, *others)}) == 6
    assert (source.timestep(), source.last_timestep()) == (800, 999)
    beside = find(str(sd_folder), teacher=str(sd_folder))
    assert (beside.timestep(), beside.last_timestep()) == (None, 999)
    assert beside.many_steps(2, 3.0).about == teacher.about
    assert find(str(finished_run / "student")).plain().about == student.about  # an adapter, or the run around it
    assert find(str(sd_folder)).plain(4, 3.0).about["weights"] == teacher.about["weights"]


@torch.no_grad()
@pytest.mark.parametrize("timestep", [999, 500])
def test_undistilled_is_the_teachers_own_single_step(finished_run, timestep):
    source = find(str(finished_run))
    teacher = from_pipeline(source.many_steps(2, 3.0).open())
    x0 = one_step(teacher, teacher.encode(["red apple"]), noise(teacher.latent_shape, [1]), timestep)
    wanted = np.asarray(to_pil(teacher.decode(x0)[0])).astype(int)
    found = generate.generate_images(source.undistilled(timestep).open(), ["red apple"], [1]).images[0]
    assert np.abs(np.asarray(found).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("name", ["./gone", "gone", "/no/such/place"])
def test_a_missing_source_is_named(name):
    with raises_naming(repr(name)):
        find(name)


def test_a_folder_of_images_is_not_a_source(tmp_path):
    assert find(str(tmp_path)) is None


def test_a_student_takes_the_steps_that_it_was_trained_for(finished_run, tmp_path):
    with raises_naming("--steps is 4", finished_run):
        find(str(finished_run)).plain(steps=4)
    folder = shutil.copytree(finished_run / "student", tmp_path / "student")
    about = json.loads((folder / "wadi.json").read_text())
    (folder / "wadi.json").write_text(json.dumps(about | {"timesteps": [799, 399]}))
    student = find(str(folder)).plain()
    assert (student.steps, student.about["timestep"]) == (2, [799, 399])
    with raises_naming("--steps is 1", [799, 399]):
        find(str(folder)).plain(steps=1)


def test_a_pipeline_does_not_know_its_teacher(sd_folder):
    with raises_naming("--teacher", sd_folder):
        Source(str(sd_folder), pipeline=True).many_steps(2, 3.0)


class OtherFamily(StableDiffusion):
    """The family of another kind of pipeline."""


def test_families_are_not_mixed(sd_folder, monkeypatch):
    student = find(str(sd_folder)).plain().open()
    teacher = find(str(sd_folder)).plain().open()
    require_same_family(student, teacher)
    other = type("OtherPipeline", (type(teacher),), {})
    teacher.__class__ = other
    monkeypatch.setitem(registry.FAMILIES, "OtherPipeline", f"{__name__}:OtherFamily")
    with raises_naming("StableDiffusion", "OtherFamily"):
        require_same_family(student, teacher)


def test_a_folder_without_weights_is_an_error(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with raises_naming("unet"):
        find(str(tmp_path)).plain()


def test_tiny_pipelines_differ_by_seed(tmp_path, sd_folder):
    tiny.stable_diffusion(tmp_path / "parts", seed=1).save_pretrained(tmp_path / "other")
    assert find(str(tmp_path / "other")).plain().key != find(str(sd_folder)).plain().key


def adapter_with(folder, to, about=None, config=None):
    """A copy of a student's adapter with other entries in ``wadi.json`` or in its config."""
    shutil.copytree(folder, to)
    for name, changes in (("wadi.json", about or {}), ("adapter_config.json", config or {})):
        content = json.loads((to / name).read_text())
        (to / name).write_text(json.dumps(content | changes))
    return find(str(to))


def test_adapters_that_differ_only_in_resolution_are_kept_apart(finished_run, tmp_path):
    """The second one used to get the first one's images, numbers and hash; so did its teacher."""
    plain = find(str(finished_run / "student"))
    wide = adapter_with(finished_run / "student", tmp_path / "wide", {"resolution": [16, 32]})
    assert wide.plain().key != plain.plain().key
    assert wide.many_steps(2, 3.0).key != plain.many_steps(2, 3.0).key
    assert wide.undistilled(999).key != plain.undistilled(999).key
    for source, size in ((plain, (16, 16)), (wide, (32, 16))):
        for generator in (source.plain(), source.many_steps(1, 1.0)):
            folder = tmp_path / generator.key
            generate_missing(generator, PROMPTS[:1], SEEDS[:1], folder)
            assert Image.open(folder / file_name(0)).size == size
    same = adapter_with(finished_run / "student", tmp_path / "same", {"resolution": None})
    assert same.plain().key == plain.plain().key  # the model's own, stored or not


def test_settings_of_an_adapter_count_and_where_it_was_saved_does_not(finished_run, tmp_path):
    plain = find(str(finished_run / "student")).plain().key
    config = json.loads((finished_run / "student" / "adapter_config.json").read_text())
    moved = adapter_with(finished_run / "student", tmp_path / "moved", config={"base_model_name_or_path": "elsewhere"})
    assert moved.plain().key == plain
    changed = adapter_with(finished_run / "student", tmp_path / "changed", config={"r": config["r"] + 1})
    assert changed.plain().key != plain


def test_an_export_at_a_size_of_its_own_is_kept_apart(sd_folder, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "wide")
    index = json.loads((tmp_path / "wide" / "model_index.json").read_text())
    (tmp_path / "wide" / "model_index.json").write_text(json.dumps(index | {"_wadi_resolution": [16, 32]}))
    plain, wide = (find(str(folder), teacher=str(sd_folder)) for folder in (sd_folder, tmp_path / "wide"))
    assert wide.plain().key != plain.plain().key
    assert wide.many_steps(2, 3.0).key != plain.many_steps(2, 3.0).key
    generate_missing(wide.many_steps(1, 1.0), PROMPTS[:1], SEEDS[:1], tmp_path / "set")
    assert Image.open(tmp_path / "set" / file_name(0)).size == (32, 16)


def test_images_of_another_version_are_not_mixed(student, tmp_path, monkeypatch):
    key = student.key
    generate_missing(student, PROMPTS[:1], SEEDS[:1], tmp_path / "set")
    for module in ("generators", "generated"):
        monkeypatch.setattr(f"wadi.evaluate.{module}.installed_versions", lambda names: dict.fromkeys(names, "9.9"))
    assert student.key != key
    with raises_naming("libraries.diffusers"):
        generate_missing(student, PROMPTS[:1], SEEDS[:1], tmp_path / "set")
