"""Objectives, adapters and several steps in whole runs: what is trained, what is saved, and which settings are refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import tiny
from raising import raises_naming
from runs import assert_same_run, at_steps, terminate
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.distill import setup
from wadi.distill.batch import Batch
from wadi.distill.loop import distill
from wadi.distill.objectives import OBJECTIVES, make_objective, with_defaults
from wadi.distill.objectives.base import Rows
from wadi.distill.objectives.consistency import grid
from wadi.distill.optimizers import initial_state
from wadi.distill.plan.architecture import read_architecture
from wadi.distill.plan.plan import plan_run
from wadi.distill.random_draws import Random
from wadi.distill.step import train_step
from wadi.errors import Interrupted
from wadi.io.image_folders import read_fitted, to_tensor
from wadi.roles.methods import METHODS

PAIRS = {"pairs": 4, "sampler_steps": 2}
ALL = {
    "vsd": {"fake": {"guidance_scale": 1.0}}, "dmd": {}, "sid": {"objective_options": {"alpha": 0.5}},
    "consistency": {"warm_start": PAIRS},
    "dmd2": {"warm_start": PAIRS, "objective_options": {"gan_weight": 0.1}},
}  # fmt: skip


def settings(teacher, prompts, out, **changes):
    return with_defaults(tiny.settings(teacher, prompts, out, batch=4, **changes))


def one_step(sd_folder, config):
    """A training step of ``config``: ``(backbone, objective, statistics, parameters before)``."""
    torch.manual_seed(0)
    backbone = from_pipeline(load_pipeline(str(sd_folder)))
    objective = make_objective(config)
    setup.attach_roles(backbone, config)
    objective.build(backbone)
    state = initial_state(backbone.network, config, torch.device("cpu"), objective=objective)
    before = {role: values(backbone, role) for role in roles.attached(backbone.network)}
    before["head"] = {name: value.detach().clone() for name, value in objective.modules.named_parameters()}
    z = torch.randn(config.batch, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    condition = backbone.encode(["red", "blue", "green", "yellow"])
    samples = (z.flip(0), condition) if objective.needs_samples else ()
    batch = Batch(condition, backbone.encode([""]), z, z[:0], 0, *samples)
    timesteps = config.student.timesteps or (backbone.process.last_timestep,)
    return backbone, objective, train_step(backbone, batch, timesteps, objective, config, state), before


def values(backbone, role):
    return {name: value.detach().clone() for name, value in roles.parameters(backbone.network, role).items()}


def moved(before, after):
    return any(not torch.equal(value, after[name]) for name, value in before.items())


def test_each_objective_of_the_package_is_tested_here():
    assert set(ALL) == {name for name, place in OBJECTIVES.items() if place.startswith("wadi.")}


@pytest.mark.parametrize("name", ALL)
def test_each_objective_trains_what_it_says(name, sd_folder, prompts_path, tmp_path):
    config = settings(sd_folder, prompts_path, tmp_path, objective=name, **ALL[name])
    backbone, objective, stats, before = one_step(sd_folder, config)
    assert moved(before["student"], values(backbone, "student"))
    assert ("fake" in before) == (objective.fake_defaults is not None)
    if "fake" in before:
        assert moved(before["fake"], values(backbone, "fake"))
        assert stats.distances is not None
    assert bool(before["head"]) == (name == "dmd2")
    if before["head"]:
        assert moved(before["head"], dict(objective.modules.named_parameters()))
        assert 0 <= float(stats.of_objective["gan_head_accuracy"]) <= 1
    assert all(torch.isfinite(value) for value in stats.scalars().values())
    assert all(
        p.requires_grad for role in roles.attached(backbone.network) for p in roles.parameters(backbone.network, role).values()
    )


@pytest.mark.parametrize("name", ["sid", "dmd2"])
def test_the_students_loss_leaves_the_fake_model_alone(name, sd_folder, prompts_path, tmp_path):
    """Its graph reaches through the fake model, and the head; only the fake model's own loss may move them."""
    config = settings(sd_folder, prompts_path, tmp_path, objective=name, **ALL[name], fake={"lr": 1e-12})
    gradients = {}

    class Recorded(make_objective(config).__class__):
        def fake_loss(self, networks, rows):
            parameters = [*roles.parameters(networks.backbone.network, "fake").values(), *self.modules.parameters()]
            gradients["left"] = [p for p in parameters if p.grad is not None]
            return super().fake_loss(networks, rows)

    import wadi.distill.objectives as registry

    plain = registry.make_objective
    made = plain(config)
    made.__class__ = Recorded
    torch.manual_seed(0)
    backbone = from_pipeline(load_pipeline(str(sd_folder)))
    setup.attach_roles(backbone, config)
    made.build(backbone)
    state = initial_state(backbone.network, config, torch.device("cpu"), objective=made)
    z = torch.randn(4, *backbone.latent_shape)
    condition = backbone.encode(["red"] * 4)
    samples = (z, condition) if made.needs_samples else ()
    train_step(backbone, Batch(condition, condition[:1], z, z[:0], 0, *samples), [800], made, config, state)
    assert gradients["left"] == []


@pytest.mark.parametrize("steps", [[800, 400], [900, 675, 450, 225]])
def test_micro_batches_do_not_change_a_student_of_several_steps(steps, sd_folder, prompts_path, tmp_path):
    after = []
    for split in ({"batch": 4, "accumulate": 1}, {"batch": 2, "accumulate": 2}):
        config = with_defaults(
            tiny.settings(sd_folder, prompts_path, tmp_path / str(split), student={"timesteps": steps}, **split)
        )
        torch.manual_seed(0)
        backbone = from_pipeline(load_pipeline(str(sd_folder)))
        setup.attach_roles(backbone, config)
        state = initial_state(backbone.network, config, torch.device("cpu"))
        z = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
        condition, null = backbone.encode(["red", "blue", "green", "yellow"]), backbone.encode([""])
        stats = train_step(backbone, Batch(condition, null, z, z[:0]), steps, make_objective(config), config, state)
        after.append(float(stats.loss_student))
    assert after[0] == pytest.approx(after[1], rel=1e-4)


@pytest.mark.parametrize("adapter", METHODS)
def test_every_adapter_trains_plans_saves_and_generates(adapter, sd_folder, prompts_path, tmp_path):
    from wadi.pipelines.generate import generate_images
    from wadi.pipelines.load import load

    linear = r".*(attn1|attn2)\.to_(q|k|v)"
    rank = {} if METHODS[adapter].ranks is None else {"rank": 2}
    options = {"boft": {"boft_block_size": 4}, "oft": {"oft_block_size": 8}, "road": {"group_size": 8}}.get(adapter, {})
    role = {"adapter": adapter, "target_modules": linear, "adapter_options": options, "lr": 0.05, "rank": None, **rank}
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=2, student={**role, "timesteps": [800]}, fake=role)
    plan = plan_run(config, read_architecture(str(sd_folder)))
    folder = distill(config)
    stored = json.loads((folder / "student" / "adapter_config.json").read_text())
    assert stored["peft_type"].lower().startswith("lora" if adapter.startswith("dora") else adapter[:3])
    stored = roles.read(folder / "student")[1]
    trained = {name: value for name, value in stored.items() if not any(part in name for part in METHODS[adapter].frozen)}
    assert sum(value.numel() for value in trained.values()) == plan.student.parameters
    image = generate_images(load(folder), ["red apple"], [0]).images[0]
    plain = generate_images(load(folder, teacher=str(sd_folder)), ["red apple"], [0]).images[0]
    assert image.tobytes() == plain.tobytes()


def test_a_student_of_two_steps_is_exported_as_a_plain_call(sd_folder, prompts_path, tmp_path):
    """diffusers' own pipeline with ``num_inference_steps=2`` gives the bytes of `few_steps`, and of the run's preview."""
    import numpy as np
    from diffusers import DiffusionPipeline

    from wadi.pipelines.load import load
    from wadi.sampling import few_steps, noises

    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", student={"timesteps": [800, 400], "lr": 0.05})
    folder = distill(config)
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "out")]) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 0.0}
    image = pipeline("red apple", generator=torch.Generator().manual_seed(7), **call).images[0]
    assert main(["generate", "red apple", "--run", str(folder), "--seed", "7", "--out", str(tmp_path / "a.png")]) == 0
    assert main(["generate", "red apple", "--run", str(tmp_path / "out"), "--seed", "7", "--out", str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes() == image.tobytes()
    backbone = from_pipeline(load(folder))
    z, later = noises(backbone, [7], 2)
    with torch.no_grad():
        latents = few_steps(backbone, backbone.encode(["red apple"]), z, [800, 400], [later])
    direct = (backbone.decode(latents)[0].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(direct - np.asarray(image).astype(float)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "magic"}, ("magic", *ALL)),
        ({"objective": "sid", "objective_options": {"alpah": 1.0}}, ("objective_options.alpah", "alpha")),
        ({"objective": "sid", "objective_options": {"alpha": 1000.0}}, ("objective_options.alpha", "1000")),
        ({"objective": "dmd2", "objective_options": {"gan_weight": 0.1}}, ("dmd2", "warm_start.pairs")),
        ({"objective": "consistency"}, ("consistency", "warm_start.pairs")),
        ({"objective": "dmd2", "objective_options": {"real_images": "/photos"}}, ("real_images", "/photos", "gan_weight")),
        ({"objective": "dmd2", "objective_options": {"gan_weight": 0.1}, "compile": True}, ("compile", "dmd2")),
        (
            {"objective": "consistency", "warm_start": {**PAIRS, "weight": 0.5}, "shard": True},
            ("shard", "consistency", "warm_start.weight"),
        ),
        ({"student": {"timesteps": [400, 800]}}, ("[400, 800]",)),
        ({"student": {"timesteps": [800, 800]}}, ("[800, 800]",)),
        ({"student": {"timesteps": [1000, 500]}}, ("1000", "999")),
        ({"student": {"timesteps": [800, 700]}}, ("[800, 700]", "[800, 400]")),
        ({"student": {"timesteps": list(range(900, 0, -100))}}, ("9 timesteps",)),
        ({"student": {"adapter": "lora", "adapter_options": {"init_lora_weights": "pissa"}}}, ("init_lora_weights",)),
        ({"student": {"adapter": "lora", "adapter_options": {"lora_alpha": "high"}}}, ("high",)),
        ({"fake": {"adapter": "oft", "rank": None, "adapter_options": {"rank": 3}}}, ("'rank'", "oft_block_size")),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_written(changes, named, sd_folder, prompts_path, tmp_path):
    with raises_naming(*named):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_unknown_adapter_is_refused_with_the_list():
    with raises_naming("student.adapter", "magic", "lorad", "lora"):
        tiny.settings("t", "p", "o", student={"adapter": "magic"})


def test_a_resumed_run_keeps_its_timesteps(sd_folder, prompts_path, tmp_path):
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, student={"timesteps": [800]}))
    with raises_naming("student.timesteps", "[800]", "[800, 400]"):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=2, student={"timesteps": [800, 400]}))


def real_images(folder, count=3):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 30), (40 * i, 200, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {i}\n")
    return folder


def test_a_gan_on_real_images_continues_without_their_folder(sd_folder, prompts_path, tmp_path, monkeypatch):
    folder = real_images(tmp_path / "real")
    options = {"gan_weight": 0.1, "real_images": str(folder)}
    config = tiny.settings(
        sd_folder, prompts_path, tmp_path / "run", objective="dmd2", objective_options=options, steps=2, checkpoint_every=1,
        fake={"null_probability": 0.5},
    )  # fmt: skip
    seen = []
    with monkeypatch.context() as patch:
        plain = make_objective(config).__class__.fake_loss
        patch.setattr(f"{plain.__module__}.DMD2.fake_loss", lambda self, n, rows: (seen.append(rows), plain(self, n, rows))[1])
        straight = distill(config)
    backbone = from_pipeline(load_pipeline(str(sd_folder)))
    pixels = torch.stack([to_tensor(read_fitted(folder / f"{i}.png", backbone.resolution)) for i in range(3)])
    latents, prompts = backbone.encode_images(pixels), backbone.encode([f"thing {i}" for i in range(3)])
    null, hidden = backbone.encode([""]).tensors["prompt_embeds"][0], 0
    for rows in seen:
        embedded = rows.sample_condition.tensors["prompt_embeds"]
        for x0, prompt, unprompted in zip(rows.samples, embedded, rows.draws["null"], strict=True):
            (which,) = [i for i in range(3) if torch.allclose(x0, latents[i], atol=1e-5)]
            torch.testing.assert_close(prompt, null if unprompted else prompts.tensors["prompt_embeds"][which])
            hidden += int(unprompted)
    assert 0 < hidden < len(seen) * config.batch  # a head cannot tell images apart by the prompts that are hidden
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        at_steps(patch, [1], terminate)
        with pytest.raises(Interrupted):
            distill(again)
    shutil.rmtree(folder)
    distill(again)
    assert_same_run(straight, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x0: {"x0": x0[:2]}, "(2, 4, 8, 8)"), (lambda x0: {"x0": x0.int()}, "x0"), (lambda x0: {"y": x0}, "x0"),
        (lambda x0: {"x0": x0 * float("nan")}, "x0"),
    ],
)  # fmt: skip
def test_damaged_latents_of_real_images(change, named, sd_folder, prompts_path, tmp_path):
    options = {"gan_weight": 0.1, "real_images": str(real_images(tmp_path / "real"))}
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", objective="dmd2", objective_options=options, steps=1)
    file = distill(config) / "real_images.safetensors"
    with safe_open(file, "pt") as stored:
        header, x0 = stored.metadata(), stored.get_tensor("x0")
    save_file(change(x0), file, header)
    with raises_naming(file, named):
        distill(dataclasses.replace(config, steps=2))


@pytest.mark.parametrize(
    ("timesteps", "count", "ends"),
    [
        ([999], 4, [0, 250, 500, 749, 999]), ([999, 749, 499, 249], 4, [0, 249, 499, 749, 999]),
        ([999, 749, 499, 249], 8, [0, 125, 249, 375, 499, 624, 749, 874, 999]),
    ],
)  # fmt: skip
def test_consistency_trains_at_every_timestep_of_the_student(timesteps, count, ends):
    assert grid(timesteps, count) == ends


def test_too_few_intervals_for_the_timesteps():
    with raises_naming("solver_steps", 3, [999, 749, 499, 249]):
        grid([999, 749, 499, 249], 3)


@pytest.mark.parametrize("damage", ["missing", "empty", "no prompt", "empty prompt", "not an image", "cache"])
def test_real_images_that_cannot_be_used(damage, sd_folder, prompts_path, tmp_path):
    folder, prompts = tmp_path / "real", str(prompts_path)
    if damage == "empty":
        folder.mkdir()
    elif damage != "missing":
        real_images(folder)
    named = folder / "1.png"
    if damage == "no prompt":
        (folder / "1.txt").unlink()
    elif damage == "empty prompt":
        (folder / "1.txt").write_text(" \n")
    elif damage == "not an image":
        named.write_bytes(b"nothing")
    elif damage == "cache":
        prompts = str(tmp_path / "cache")
        assert main(["embed", "--teacher", str(sd_folder), "--prompts", str(prompts_path), "--out", prompts]) == 0
    if damage in ("missing", "empty", "cache"):
        named = folder
    options = {"gan_weight": 0.1, "real_images": str(folder)}
    with raises_naming(named):
        distill(tiny.settings(sd_folder, prompts, tmp_path / "run", objective="dmd2", objective_options=options))


@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_the_fake_model_of_dmd2_may_have_guidance_0(gan_weight, sd_folder, prompts_path, tmp_path):
    """0 is the null prompt alone; it must not read as "not set"."""
    options = {"objective": "dmd2", "objective_options": {"gan_weight": gan_weight}, "fake": {"guidance_scale": 0.0}}
    config = settings(sd_folder, prompts_path, tmp_path, **options)
    backbone = from_pipeline(load_pipeline(str(sd_folder)))
    objective = make_objective(config)
    objective.build(backbone)
    scales = []

    class Networks:
        process = backbone.process

        def teacher(self, x_t, t, condition, guidance_scale=1.0):
            return x_t

        def fake(self, x_t, t, condition, guidance_scale=1.0):
            scales.append(guidance_scale)
            return x_t

        def fake_with_features(self, x_t, t, condition):
            return x_t, torch.zeros(len(x_t), 3, backbone.feature_width)

    x0 = torch.ones(2, *backbone.latent_shape)
    draws = objective.draw_student(x0, backbone.process, Random(torch.Generator().manual_seed(0)))
    objective.student_loss(Networks(), Rows(x0, None, None, None, draws))
    assert scales == [0.0]
