"""The whole recipe on small icon sets, and the files in the package."""

import functools
import json

import pytest
import torch
from zoo_toys import write_tarballs

from raising import raises_naming
from wadi.zoo import CONCEPTS, eval_prompts, load_classifier, load_teacher, teacher_path
from wadi.zoo.recipe import autoencoder, judge_training, stages
from wadi.zoo.recipe import export as export_module
from wadi.zoo.recipe.config import ZooConfig
from wadi.zoo.recipe.stages import train

TINY = {"minutes_autoencoder": 0.005, "minutes_teacher": 0.005, "steps_classifier": 2, "batch_autoencoder": 2}


@pytest.mark.parametrize("wrong", [{"stage": "bake"}, {"pool": 0}, {"batch_teacher": -1}, {"minutes_teacher": 0}])
def test_settings_out_of_range_are_named(wrong):
    with raises_naming(*wrong.values()):
        ZooConfig(**wrong)


def test_a_stage_names_the_missing_file_of_an_earlier_one(tmp_path):
    with raises_naming(tmp_path):
        train(ZooConfig(out=str(tmp_path), stage="export", tarballs=str(write_tarballs(tmp_path)), **TINY))


def _last_line(path):
    return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.slow
def test_every_stage_from_tarballs_to_card(tmp_path, monkeypatch):
    tarballs = tmp_path / "npm"
    tarballs.mkdir()
    write_tarballs(tarballs)
    monkeypatch.setattr(export_module, "eval_prompts", lambda: eval_prompts()[:2])
    monkeypatch.setattr(judge_training, "accuracy_on_data", functools.partial(judge_training.accuracy_on_data, count=32))
    monkeypatch.setattr(judge_training, "POOL", 64)
    monkeypatch.setattr(autoencoder, "FOLDED_FROM", 64)
    settings = {"out": str(tmp_path / "zoo"), "tarballs": str(tarballs), "pool": 64, "first_fill": 1, "batch_teacher": 4}
    weights = train(ZooConfig(**settings, **TINY))
    assert weights == stages.weights_folder(ZooConfig(**settings))
    assert {"README.md", "quality.json", "teacher", "classifier"} <= {p.name for p in weights.iterdir()}
    last = _last_line(tmp_path / "zoo" / "teacher.jsonl")
    train(ZooConfig(**settings, **TINY | {"stage": "teacher", "minutes_teacher": last["minutes"] + 0.01}))
    assert _last_line(tmp_path / "zoo" / "teacher.jsonl")["step"] > last["step"]
    assert not list(weights.rglob("*.bin"))
    assert not list((tmp_path / "zoo").rglob("*.pt"))


def test_shipped_teacher_is_a_plain_pipeline_of_at_most_25_megabytes():
    from diffusers import DiffusionPipeline

    assert sum(file.stat().st_size for file in teacher_path().rglob("*") if file.is_file()) <= 25e6
    pipe = DiffusionPipeline.from_pretrained(teacher_path())
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.unet.config.addition_embed_type == "text"
    assert pipe.vae.config.scaling_factor == 1.0


def test_shipped_teacher_generates_the_prompted_concepts():
    pipe, judge = load_teacher(), load_classifier()
    assert judge.concepts == list(CONCEPTS)
    prompts, names, seeds = zip(*eval_prompts()[:16], strict=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(list(prompts), num_inference_steps=12, guidance_scale=2.5, generator=generators, output_type="pt").images
    assert images.shape == (16, 3, 64, 64)
    assert judge.top1(images, list(names)) >= 0.75


def test_shipped_quality_meets_the_goals_and_is_on_the_card():
    folder = teacher_path().parent
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["psnr_each"] >= 30
    assert quality["psnr_mean"] >= 30
    assert quality["classifier_data"] >= 0.98
    assert quality["teacher_top1"] >= 0.9
    card = (folder / "README.md").read_text()
    for fact in (f"{quality['teacher_top1']:.4f}", "Apache-2.0", "CC-BY-4.0", "MIT", "Twitter", "Google", "Microsoft"):
        assert fact in card
