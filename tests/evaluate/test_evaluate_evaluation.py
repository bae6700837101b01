"""Evaluation from sources to a result. Bad input is an error before anything is measured."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from evaluate_toys import clip_folder, coco, folder_of, network, noisy

from raising import raises_naming
from wadi.cli.main import main
from wadi.evaluate import protocols
from wadi.evaluate.evaluation import Evaluation
from wadi.evaluate.judge import Judge
from wadi.evaluate.metric_table import METRICS, Options, kid_size
from wadi.evaluate.reference import folder_reference
from wadi.evaluate.result import read_result
from wadi.metrics.features import extract
from wadi.metrics.frechet import frechet_distance
from wadi.metrics.neighbours import prdc


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))


def options(**changes):
    return Options(**{"features": network(), "batch": 4, **changes})


def tensors(indices, side=16):
    return torch.stack([torch.from_numpy(np.array(noisy(i, side))).permute(2, 0, 1) for i in indices])


@pytest.fixture
def real(tmp_path):
    return folder_of(tmp_path / "real", 14)


@pytest.fixture
def fake(tmp_path):
    return folder_of(tmp_path / "fake", 10, first=100)


def of(metrics, reference, **changes):
    return Evaluation(metrics, options(**changes), reference=folder_reference(reference))


def test_an_evaluation_gives_the_values_of_the_metrics(real, fake):
    row = of(["fd", "kd", "pr"], real).folder_row(fake)
    one, other = (extract([tensors(range(*span))], network()) for span in ((100, 110), (14,)))
    assert row.images == 10
    assert row.metrics["fd corners"].value == pytest.approx(frechet_distance(one, other))
    assert row.metrics["fd corners"].std > 0
    wanted = prdc(other, one, 3)
    for name in ("precision", "recall", "density", "coverage"):
        assert row.metrics[name].value == pytest.approx(getattr(wanted, name))


def test_folders_tensors_and_iterators_are_one(real, fake):
    sources = [tensors(range(100, 110)), tensors(range(100, 110)) / 255, (noisy(i) for i in range(100, 110))]
    wanted = of(["fd", "kd"], real).folder_row(fake).metrics
    for source in sources:
        assert of(["fd", "kd"], real).row(source).metrics == wanted
    assert of(["fd", "kd"], real, batch=3).folder_row(fake).metrics == pytest.approx(wanted)


def test_images_are_streamed(real):
    alive, most = [0], [0]

    def pictures():
        for i in range(40):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield noisy(i)

    evaluation = of(["fd"], real, batch=4)
    plain = evaluation.judge.caches["features"]

    def looked(images):
        alive[0] -= len(images)
        return plain(images)

    evaluation.judge.caches["features"] = looked
    looked.flush = plain.flush
    assert evaluation.row(pictures()).images == 40
    assert most[0] <= 4


def test_features_are_remembered_by_content(real, fake, tmp_path):
    of(["fd"], real).folder_row(fake)
    (tmp_path / "moved").mkdir()
    for path in fake.iterdir():
        path.rename(tmp_path / "moved" / f"x{path.name}")
    again = of(["fd"], real)
    again.folder_row(tmp_path / "moved")
    cache = again.judge.caches["features"]
    assert (cache.hits, cache.misses) == (24, 0)


def test_settings_tell_every_choice(real, fake):
    evaluation = of(["fd", "kd", "pr"], real)
    protocol = evaluation.result([evaluation.folder_row(fake)]).protocol
    about = protocol["metrics"]["kd"]
    assert about["digest"] == "0" * 64
    assert about["resize"] == "clean"
    assert about["subset_size"] == 5
    assert protocol["metrics"]["pr"]["k"] == 3
    assert protocol["images"] == 10
    assert protocol["reference"]["count"] == 14
    assert protocol["spread"] == {"method": "influence of each image", "similar_prompts": False, "seed": 0}


@pytest.mark.parametrize(
    "changes", [{"k": 4}, {"spread": False}, {"features": network("other")}, {"seed": 1}], ids=lambda c: next(iter(c))
)
def test_every_choice_moves_the_hash(real, fake, changes):
    one, other = of(["fd", "pr"], real), of(["fd", "pr"], real, **changes)
    rows = [one.folder_row(fake)]
    assert one.result(rows).hash != other.result(rows).hash


def test_reference_size_and_count_move_the_hash(real, fake, tmp_path):
    rows = [of(["fd"], real).folder_row(fake)]
    plain = of(["fd"], real).result(rows).hash
    assert of(["fd"], folder_of(tmp_path / "shifted", 14, first=1)).result(rows).hash != plain
    assert of(["fd"], folder_of(tmp_path / "same", 14)).result(rows).hash == plain  # content counts, not place
    sized = Evaluation(["fd"], options(), reference=folder_reference(real), size=12)
    assert sized.result([sized.folder_row(fake)]).hash != plain


def test_sets_of_different_numbers_are_no_table(real, fake, tmp_path):
    evaluation = of(["fd"], real)
    rows = [evaluation.folder_row(fake), evaluation.folder_row(folder_of(tmp_path / "few", 5))]
    with raises_naming("[5, 10]"):
        evaluation.result(rows)


def test_subsets_of_kernel_distances():
    assert [kid_size(*counts) for counts in ((30_000, 40_504), (1500, 9000), (10, 5))] == [1000, 750, 2]


@pytest.mark.parametrize(("metric", "count", "least"), [("pr", 3, 4), ("kd", 3, 4), ("fd", 1, 2)])
def test_too_few_images_are_counted(real, tmp_path, metric, count, least):
    with raises_naming(f"{count} images", repr(metric), least):
        of([metric], real).folder_row(folder_of(tmp_path / "few", count))
    with raises_naming(f"{count} reference images", repr(metric), least):
        of([metric], tmp_path / "few").folder_row(folder_of(tmp_path / "enough", 8, first=50))


def test_features_that_are_not_finite_are_an_error(real, fake):
    with raises_naming("4 of 4", "NaN"):
        of(["fd"], real, features=network(value=torch.nan)).folder_row(fake)


def test_each_image_needs_one_prompt(real, fake, tmp_path):
    weights = {"clip": str(clip_folder(tmp_path / "clip"))}
    prompts = [f"thing {i}" for i in range(10)]
    good = Evaluation(["clip"], options(weights=weights), prompts=prompts).folder_row(fake).metrics["clip"]
    assert -1 < good.value < 1
    assert good.low < good.value < good.high
    for wrong in (prompts[:9], [*prompts, "more"]):
        with raises_naming("10 images", f"{len(wrong)} prompts"):
            Evaluation(["clip"], options(weights=weights), prompts=wrong).folder_row(fake)
        with raises_naming(f"{len(wrong)} prompts"):
            Evaluation(["clip"], options(weights=weights), prompts=wrong).row(noisy(i) for i in range(10))
    with raises_naming("'clip'", "--prompts"):
        Evaluation(["clip"], options(weights=weights)).folder_row(fake)
    about = Evaluation(["clip"], options(weights=weights), prompts=prompts)
    protocol = about.result([about.folder_row(fake)]).protocol
    assert protocol["metrics"]["clip"]["network"] == "clip"  # not where it lies
    assert protocol["prompts"]["count"] == 10


def test_clip_depends_on_the_order_of_prompts(fake, tmp_path):
    weights = {"clip": str(clip_folder(tmp_path / "clip"))}
    prompts = [f"thing {i}" for i in range(10)]
    one, other = (
        Evaluation(["clip"], options(weights=weights, batch=batch), prompts=p).folder_row(fake).metrics["clip"].value
        for batch, p in ((3, prompts), (10, prompts))
    )
    assert one == pytest.approx(other, abs=1e-6)
    turned = Evaluation(["clip"], options(weights=weights), prompts=prompts[::-1]).folder_row(fake).metrics["clip"].value
    assert turned != pytest.approx(one, abs=1e-6)


def test_diversity_is_that_of_images_with_the_same_prompt(fake):
    prompts = ["a", "b", "a", "c", "b", "a", "d", "e", "f", "g"]
    row = Evaluation(["diversity"], options(), prompts=prompts).folder_row(fake)
    rows = extract([tensors(range(100, 110))], network()).double()
    of_a = np.mean([float((rows[i] - rows[j]).norm()) for i, j in itertools.combinations((0, 2, 5), 2)])
    assert row.metrics["diversity"].value == pytest.approx((of_a + float((rows[1] - rows[4]).norm())) / 2)
    with raises_naming("'diversity'"):
        Evaluation(["diversity"], options(), prompts=list("abcdefghij")).folder_row(fake)
    with raises_naming("'diversity'", "--prompts"):
        Evaluation(["diversity"], options()).folder_row(fake)


def test_unknown_metrics_and_missing_references_are_named(fake):
    with raises_naming("'fidd'", *METRICS):
        Judge(["fidd"])
    with raises_naming("'fd'", "--reference"):
        Evaluation(["fd"], options()).folder_row(fake)
    with raises_naming(*METRICS):
        Judge([])


# --- the command ------------------------------------------------------------------------------------------------------------


def run(*arguments):
    return main(["eval", *map(str, arguments)])


def failed(capsys, *arguments):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


QUICK = ("--features", "zoo", "--device", "cpu")


def test_a_folder_against_a_folder(real, fake, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert run(fake, "--reference", real, "--metrics", "fd,pr", "--out", out, *QUICK) == 0
    assert "| fake | 10 |" in capsys.readouterr().out
    found = read_result(out)
    assert set(found.rows[0].metrics) == {"fd zoo-classifier", "precision", "recall", "density", "coverage"}
    assert found.command.startswith("wadi eval ")
    assert found.environment["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in found.environment["versions"]


@pytest.fixture(scope="module")
def drawn(finished_run, prompts_path, tmp_path_factory):
    """A student and its teacher, on a file of prompts, with the teacher's images as reference."""
    place = tmp_path_factory.mktemp("drawn")
    arguments = [
        finished_run, "--protocol", prompts_path, "--reference", "teacher", "--teacher-steps", "2", "--beside-teacher",
        "--metrics", "fd,kd,pr,diversity", "--pictures", place / "pictures", *QUICK,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WADI_CACHE", str(place / "cache"))
        assert run(*arguments, "--out", place / "a.json", "--table", place / "a.md", "--speed", "1") == 0
    return place, arguments


def test_a_run_and_its_teacher(drawn):
    place, _ = drawn
    result = read_result(place / "a.json")
    assert [row.name for row in result.rows] == [
        "teacher, 2 steps", "teacher forced to one step, t = 999", "teacher forced to one step, t = 800", "finished, one step",
    ]  # fmt: skip
    assert [row.generator["steps"] for row in result.rows] == [2, 1, 1, 1]
    assert result.rows[0].speed["evaluations"] == 4  # two steps, each with guidance
    assert result.rows[3].speed["evaluations"] == 1
    assert result.rows[3].speed["parameters"] == result.rows[0].speed["parameters"]
    assert result.protocol["prompts"]["count"] == 4
    assert result.protocol["reference"]["generator"]["steps"] == 2
    assert result.protocol["seeds"]["set"] == 1
    table = (place / "a.md").read_text()
    assert "| finished, one step | 4 |" in table
    assert result.hash in table


def test_the_reference_is_from_other_noise(drawn):
    """The reference is set 0, as the settings say; the generators are measured on set 1."""
    seeds = {}
    for folder in (drawn[0] / "pictures").glob("*/teacher-*"):
        lines = (folder / "prompts.jsonl").read_text().splitlines()
        seeds[folder.name[-4:]] = [json.loads(line)["seed"] for line in lines]
    assert seeds == {"set0": [0, 1, 2, 3], "set1": [1_000_000 + i for i in range(4)]}


def test_the_same_command_generates_nothing_and_measures_the_same(drawn, tmp_path, monkeypatch):
    place, arguments = drawn
    monkeypatch.setattr("wadi.evaluate.generated.generate_images", None)
    assert run(*arguments, "--out", tmp_path / "b.json") == 0
    one, other = read_result(place / "a.json"), read_result(tmp_path / "b.json")
    assert [row.metrics for row in other.rows] == [row.metrics for row in one.rows]
    assert one.hash == other.hash
    assert run("--compare", place / "a.json", tmp_path / "b.json") == 0


def test_other_seeds_give_another_protocol_hash(drawn, tmp_path, capsys):
    place, arguments = drawn
    assert run(*arguments, "--set", "2", "--out", tmp_path / "b.json") == 0
    capsys.readouterr()
    assert "seeds.set: 1 -> 2" in failed(capsys, "--compare", place / "a.json", tmp_path / "b.json")


def test_a_reference_of_another_protocol_is_an_error(drawn, finished_run, tmp_path, capsys):
    place, _ = drawn
    folder = next((place / "pictures").glob("*/teacher-*-set0"))
    (tmp_path / "other.txt").write_text("red apple\nblue car\ngreen tree\nanother thing\n")
    told = failed(
        capsys, finished_run, "--protocol", tmp_path / "other.txt", "--reference", folder, "--metrics", "fd",
        "--pictures", tmp_path / "pictures", *QUICK,
    )  # fmt: skip
    assert "prompts.sha256" in told
    student = next((place / "pictures").glob("*/student-*-set1"))
    told = failed(capsys, student, "--protocol", tmp_path / "other.txt", "--reference", student, "--metrics", "fd", *QUICK)
    assert "prompts.sha256" in told


def test_a_generated_folder_contains_its_prompts(drawn, tmp_path):
    place, _ = drawn
    student = next((place / "pictures").glob("*/student-*-set1"))
    weights = f"clip={clip_folder(tmp_path / 'clip')}"
    assert run(student, "--metrics", "clip", "--weights", weights, "--out", tmp_path / "c.json", "--device", "cpu") == 0
    found = read_result(tmp_path / "c.json")
    assert found.rows[0].generator["drawn_by"]["kind"] == "student"
    assert found.protocol["prompts"] == read_result(place / "a.json").protocol["prompts"]


def test_a_folder_generated_by_the_protocol_gives_the_same_row(drawn, prompts_path, tmp_path, capsys):
    """Other images of the same prompts can be measured too, but their seeds are unknown, so the hash differs."""
    place, _ = drawn
    student, reference = (next((place / "pictures").glob(f"*/{name}")) for name in ("student-*-set1", "teacher-*-set0"))
    common = ("--protocol", prompts_path, "--reference", reference, "--metrics", "fd", *QUICK)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in student.glob("*.png"):
        (plain / path.name).write_bytes(path.read_bytes())
    for folder, name in ((student, "drawn"), (plain, "plain")):
        assert run(folder, *common, "--out", tmp_path / f"{name}.json") == 0
    one, other = (read_result(tmp_path / f"{name}.json") for name in ("drawn", "plain"))
    assert one.rows[0].metrics == other.rows[0].metrics
    assert one.rows[0].metrics["fd zoo-classifier"] == read_result(place / "a.json").rows[3].metrics["fd zoo-classifier"]
    assert (one.protocol["seeds"]["set"], other.protocol["seeds"]) == (1, None)
    capsys.readouterr()
    assert "seeds" in failed(capsys, "--compare", tmp_path / "drawn.json", tmp_path / "plain.json")


def test_prompts_of_folders_enter_the_hash_and_are_not_mixed(fake, tmp_path):
    weights = {"clip": str(clip_folder(tmp_path / "clip"))}
    results = []
    for words in ("thing", "other"):
        evaluation = Evaluation(["clip"], options(weights=weights))
        results.append(evaluation.result([evaluation.row(tensors(range(4)), [f"{words} {i}" for i in range(4)])]))
    assert results[0].hash != results[1].hash
    rows = [evaluation.row(tensors(range(4)), [f"{words} {i}" for i in range(4)]) for words in ("thing", "other")]
    with raises_naming("prompts"):
        evaluation.result(rows)


def test_an_exported_student_is_measured_as_the_run_is(finished_run, prompts_path, tmp_path):
    """An exported pipeline gives the same images. Its teacher is known only by --teacher."""
    export = tmp_path / "export"
    assert main(["export", "--run", str(finished_run), "--out", str(export)]) == 0
    from wadi.distill.config_files import load_config

    teacher = load_config(finished_run / "config.yaml").teacher
    common = ("--protocol", prompts_path, "--reference", "teacher", "--teacher-steps", "2", "--metrics", "fd", *QUICK)
    for what, name in ((finished_run, "run"), (export, "export")):
        places = ("--pictures", tmp_path / "pictures", "--out", tmp_path / f"{name}.json")
        assert run(what, "--teacher", teacher, "--beside-teacher", *common, *places) == 0
    one, other = (read_result(tmp_path / f"{name}.json") for name in ("run", "export"))
    assert one.hash == other.hash
    assert one.rows[-1].metrics == other.rows[-1].metrics
    assert [row.name for row in other.rows] == ["teacher, 2 steps", "teacher forced to one step, t = 999", "export, one step"]


def test_coco_from_a_folder(finished_run, tmp_path, capsys):
    root = coco(tmp_path / "coco")
    arguments = (finished_run, "--protocol", "coco2017-5k", "--reference", root, "--metrics", "fd", *QUICK)
    places = ("--pictures", tmp_path / "pictures", "--out", tmp_path / "a.json")
    assert run(*arguments, "--count", "5", *places) == 0
    result = read_result(tmp_path / "a.json")
    assert result.protocol["size"] == 256
    assert result.protocol["images"] == 5
    assert result.protocol["reference"]["count"] == 6
    capsys.readouterr()
    assert "6 images" in failed(capsys, *arguments)
    assert run(*arguments, "--count", "5", *places[:2], "--out", tmp_path / "b.json") == 0
    assert read_result(tmp_path / "b.json").hash == result.hash
    noisy(77).save(root / "val2017" / "000000000100.jpg")  # the same list, another image
    assert run(*arguments, "--count", "5", *places[:2], "--out", tmp_path / "b.json") == 0
    capsys.readouterr()
    assert "reference.sha256" in failed(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    (root / "val2017" / "000000000107.jpg").unlink()
    assert "val2017/000000000107.jpg" in failed(capsys, *arguments, "--count", "5")
    assert "--reference FOLDER" in failed(capsys, finished_run, "--protocol", "coco2017-5k")


def test_the_zoo_by_its_own_protocol(tmp_path):
    arguments = ("zoo", "--protocol", "zoo", "--count", "4", "--metrics", "fd-zoo,top1", "--pictures", tmp_path / "pictures")
    assert run(*arguments, "--out", tmp_path / "zoo.json", "--device", "cpu") == 0
    result = read_result(tmp_path / "zoo.json")
    assert result.rows[0].name == "shipped student, one step"
    assert result.rows[0].metrics["top1"].value >= 0.5  # two of four would be a broken student
    assert result.protocol["reference"]["generator"]["steps"] == protocols.ZOO_STEPS


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((), "folder"),
        (("gone/not/there",), "gone/not/there"),
        (("FAKE", "--metrics", "fd"), "--reference"),
        (("FAKE", "--reference", "EMPTY", "--metrics", "fd"), "EMPTY"),
        (("EMPTY", "--reference", "FAKE", "--metrics", "fd"), "EMPTY"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fid"), "inception-2015-12-05.pt"),
        (("FAKE", "--metrics", "clip", "--prompts", "PROMPTS"), "openai/clip-vit-base-patch32"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--features", "vgg"), "'vgg'"),
        (("FAKE", "--metrics", "clip", "--weights", "clap=x"), "'clap'"),
        (("FAKE", "--protocol", "coco2015"), "coco2015"),
        (("RUN",), "--protocol"),
        (("RUN", "--protocol", "zoo", "--steps", "4"), "--steps is 4"),
        (("RUN", "--protocol", "zoo", "--dtype", "int8"), "--dtype"),
        (("FAKE", "--metrics", "top1"), "--protocol zoo"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--k", "0"), "--k"),
        (("FAKE", "--reference", "teacher", "--metrics", "fd"), "--reference"),
        (("--compare", "gone.json", "also.json"), "gone.json"),
        (("FAKE", "--metrics", "clip", "--weights", "clip"), "'clip'"),
        (("FAKE", "--metrics", "clip", "--weights", "clip=a", "clip=b"), "'clip'"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--weights", "clip=a"), "clip"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--k", "5"), "--k"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--count", "5"), "--count"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--set", "5"), "--set"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--steps", "5"), "--steps"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--guidance-scale", "5"), "--guidance-scale"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--beside-teacher"), "--beside-teacher"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--speed", "5"), "--speed"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--teacher", "FAKE"), "--teacher"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--download"), "--download"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--ids", "PROMPTS"), "--ids"),
        (("FAKE", "--reference", "FAKE", "--metrics", "clip"), "--reference"),
        (("FAKE", "--metrics", "clip", "--features", "zoo"), "--features"),
        (("RUN", "--protocol", "zoo", "--prompts", "PROMPTS"), "--prompts"),
        (("RUN", "--protocol", "zoo", "--teacher-steps", "5"), "--teacher-steps"),
        (("FAKE", "--metrics", "clip", "--prompts", "PROMPTS", "--pairs", "PROMPTS"), "--pairs"),
        (("--compare", "a.json", "b.json", "--k", "5"), "--k"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--out", "FAKE"), "FAKE"),
        (("FAKE", "--reference", "FAKE", "--metrics", "fd", "--table", "PROMPTS"), "wadi eval: begin"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_named_in_one_line(fake, finished_run, tmp_path, capsys, arguments, value):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "prompts.txt").write_text("".join(f"thing {i}\n" for i in range(10)))
    places = {"FAKE": fake, "EMPTY": tmp_path / "EMPTY", "RUN": finished_run, "PROMPTS": tmp_path / "prompts.txt"}
    expected = str(places.get(value, value))
    assert expected in failed(capsys, *(places.get(word, word) for word in arguments))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--count", ["-1", "0", "1e3", "nan", "9" * 5000]), ("--set", ["-1", "9" * 30]), ("--size", ["0", "100000"]),
        ("--k", ["-3"]), ("--speed", ["-1", "1000000"]), ("--rounds", ["-1"]), ("--batch", ["0"]), ("--draw-batch", ["-2"]),
        ("--steps", ["0", "100000"]), ("--teacher-steps", ["0"]), ("--guidance-scale", ["nan", "inf"]), ("--threads", ["0"]),
        ("--teacher-guidance-scale", ["1e9"]), ("--coco-seed", ["-1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_numbers_out_of_range_are_named_by_the_parser(capsys, option, values):
    for value in values:
        assert option in failed(capsys, "zoo", "--protocol", "zoo", f"{option}={value}")


def test_captions_are_counted_or_listed(finished_run, tmp_path, capsys):
    root = coco(tmp_path / "coco")
    (tmp_path / "ids.txt").write_text("9000\n")
    arguments = (
        finished_run,
        "--protocol",
        "coco2017-5k",
        "--reference",
        root,
        "--metrics",
        "fd",
        "--ids",
        tmp_path / "ids.txt",
    )
    assert "--count" in failed(capsys, *arguments, "--count", "3")
    assert "--coco-seed" in failed(capsys, *arguments, "--coco-seed", "3")


def test_rounds_of_older_versions_are_accepted(real, fake, tmp_path, capsys):
    for value, spread in (("0", False), ("100", True)):
        out = tmp_path / f"{value}.json"
        assert run(fake, "--reference", real, "--metrics", "fd", "--rounds", value, "--out", out, *QUICK) == 0
        assert (read_result(out).rows[0].metrics["fd zoo-classifier"].std is not None) == spread
    assert "--rounds has no effect" in capsys.readouterr().err


def test_a_result_of_an_older_version_is_compared_with_its_own_kind(real, fake, tmp_path, capsys):
    """Results with bootstrap spreads can be read, but not compared with new ones."""
    evaluation = of(["fd"], real)
    result = evaluation.result([evaluation.folder_row(fake)])
    result.save(tmp_path / "new.json")
    del result.protocol["spread"]
    result.protocol["bootstrap"] = {"rounds": 100, "level": 0.95, "seed": 0}
    result.save(tmp_path / "old.json")
    assert run("--compare", tmp_path / "old.json", tmp_path / "old.json") == 0
    assert "bootstrap.rounds" in failed(capsys, "--compare", tmp_path / "old.json", tmp_path / "new.json")


def clip_of(folder, tmp_path, **named):
    weights = {"clip": str(clip_folder(tmp_path / "clip"))}
    return Evaluation(["clip"], options(weights=weights), **named).folder_row(folder).metrics["clip"].value


def test_unpadded_numbers_pair_as_padded_ones_do(tmp_path):
    """``10.png`` comes after ``2.png``: the same images under both kinds of names have the same score."""
    prompts = [f"thing {i}" for i in range(12)]
    for kind in ("plain", "padded"):
        (tmp_path / kind).mkdir()
        for i in range(12):
            noisy(i).save(tmp_path / kind / (f"{i}.png" if kind == "plain" else f"{i:03d}.png"))
    assert clip_of(tmp_path / "plain", tmp_path, prompts=prompts) == clip_of(tmp_path / "padded", tmp_path, prompts=prompts)


def test_a_list_pairs_images_with_prompts_whatever_their_names(fake, tmp_path, capsys):
    prompts = [f"thing {i}" for i in range(10)]
    plain = clip_of(fake, tmp_path, prompts=prompts)
    names = ["zebra", "ant", "cow", "10", "9", "b/1", "b/01", "x", "y", "a"]
    (fake / "b").mkdir()
    for old, new in zip(sorted(fake.glob("*.png")), names, strict=True):
        old.rename(fake / f"{new}.png")
    pairs = list(zip((f"{name}.png" for name in names), prompts, strict=True))
    assert clip_of(fake, tmp_path, pairs=pairs) == plain
    assert clip_of(fake, tmp_path, prompts=prompts) != plain
    weights = f"clip={tmp_path / 'clip'}"
    lines = "".join(json.dumps({"file": file, "prompt": prompt}) + "\n" for file, prompt in pairs)
    for number, (text, value) in enumerate(
        [(lines, None), (lines[: lines.rindex("{")], "a.png"), (lines + '{"file": "more.png", "prompt": "x"}', "more.png"),
         (lines + lines, "zebra.png"), ('{"file": "../x.png", "prompt": "x"}', "../x.png"),
         ('{"file": 3, "prompt": "x"}', "file"),
         ("", "empty"), ("[" * 100_000, "nested"), ('{"file": "/x.png", "prompt": "x"}', "/x.png")]
    ):  # fmt: skip
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        arguments = (fake, "--metrics", "clip", "--weights", weights, "--pairs", path, "--device", "cpu")
        if value is None:
            assert run(*arguments) == 0
            capsys.readouterr()
        else:
            assert value in failed(capsys, *arguments)


def test_a_truncated_image_is_named(real, fake, capsys):
    content = (fake / "004.png").read_bytes()
    (fake / "004.png").write_bytes(content[: len(content) // 2])
    assert "004.png" in failed(capsys, fake, "--reference", real, "--metrics", "fd", *QUICK)


def test_every_metric_has_a_name_in_the_help(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "--compare" in capsys.readouterr().out
    assert {"fid", "kid", "clip", "pr"} <= METRICS.keys()


def test_a_result_is_plain_json(real, fake, tmp_path):
    assert run(fake, "--reference", real, "--metrics", "fd", "--out", tmp_path / "a.json", *QUICK) == 0
    assert set(json.loads((tmp_path / "a.json").read_text())) == {
        "format", "protocol_hash", "command", "rows", "protocol", "environment",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["image", "reference", "prompts", "pairs", "protocol", "out", "table"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_nothing_waits_for_a_pipe_or_reads_a_folder(real, fake, tmp_path, capsys, place, make):
    """Each file of the command in turn is a pipe, or a folder."""
    path = tmp_path / "odd.png" if place != "image" else fake / "odd.png"
    make(path)
    arguments = {
        "image": (fake, "--reference", real, "--metrics", "fd"),
        "reference": (fake, "--reference", path, "--metrics", "fd"),
        "protocol": (fake, "--reference", real, "--metrics", "fd", "--protocol", path),
    }.get(place, (fake, "--reference", real, "--metrics", "fd", f"--{place}", path))
    if place == "image" and make is os.mkdir:  # a folder among the images is entered, whatever its name
        assert run(*arguments, *QUICK) == 0
    else:
        assert "odd.png" in failed(capsys, *arguments, *QUICK)


@pytest.mark.parametrize("name", ["pictures.json", "prompts.jsonl"])
@pytest.mark.parametrize(
    "data",
    [
        b"[1]", b'{"generator": 3, "prompts": 4, "seeds": []}', b"[" * 100_000, b'{"file": "\xe9"}',
        b'{"a": ' + b"9" * 5000 + b"}", b"\0",
    ],
    ids=["list", "types", "nesting", "latin-1", "digits", "zero"],
)  # fmt: skip
def test_hostile_notes_of_generated_images_are_named(fake, tmp_path, capsys, name, data):
    about = {"generator": {"kind": "student"}, "prompts": {"count": 10, "sha256": "x"}, "seeds": "x"}
    (fake / "pictures.json").write_text(json.dumps(about))
    (fake / name).write_bytes(data)
    weights = f"clip={clip_folder(tmp_path / 'clip')}"
    capsys.readouterr()
    assert name in failed(capsys, fake, "--metrics", "clip", "--weights", weights, "--device", "cpu")


def test_one_image_is_too_few_or_has_no_spread(tmp_path, capsys):
    folder = folder_of(tmp_path / "one", 1)
    assert "at least 2" in failed(capsys, folder, "--reference", folder, "--metrics", "fd", *QUICK)
    weights = {"clip": str(clip_folder(tmp_path / "clip"))}
    with raises_naming("1 images", "'clip'"):
        Evaluation(["clip"], options(weights=weights), prompts=["a"]).folder_row(folder)


def test_rows_at_the_edge_have_numbers_and_no_traceback(real, tmp_path):
    """Images that are all equal, and exactly as many as the nearest neighbours need."""
    same = tmp_path / "same"
    same.mkdir()
    for i in range(4):
        noisy(3).save(same / f"{i}.png")
    metrics = of(["fd", "kd", "pr"], real).folder_row(same).metrics
    assert all(np.isfinite(number.value) for number in metrics.values())
    assert all(number.std is None or np.isfinite(number.std) for number in metrics.values())
    assert metrics["recall"].std is None
