"""The loop: what changes and what does not, what is not finite, and what a run leaves behind."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tiny
from raising import raises_naming
from runs import state_of, stats_of
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.distill import checkpoint_folders, loop, setup
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.config_files import load_config
from wadi.distill.loop import distill
from wadi.distill.networks import RoleNetworks
from wadi.distill.objectives import make_objective, vsd, with_defaults
from wadi.errors import WadiError
from wadi.lorad.angles import layer_angles
from wadi.sampling import noise, one_step

# --- what changes -------------------------------------------------------------------------------------------------------------


def test_angles_change_and_every_other_tensor_stays(sd_folder, prompts_path, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(setup, "load_pipeline", lambda *a: kept.append(load_pipeline(*a)) or kept[0])
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    fresh = load_pipeline(sd_folder)
    for part in ("unet", "vae", "text_encoder"):
        own = {k: v for k, v in getattr(kept[0], part).state_dict().items() if "lorad_" not in k}
        expected = getattr(fresh, part).state_dict()
        assert {key.replace(".base_layer", "") for key in own} == expected.keys()
        assert all(torch.equal(value, expected[key.replace(".base_layer", "")]) for key, value in own.items())
    for role in ("student", "fake"):
        angles = list(layer_angles(kept[0].unet, role))
        moved = [name for name, theta in angles if theta.abs().max() > 0]
        assert len(moved) > 0.9 * len(angles)  # every layer that the loss reaches


def passes(config, monkeypatch):
    """Rows of each pass through the network during training, and how often each role's optimiser steps."""
    rows, plain = [], loop.train_step

    def train_step(backbone, *arguments):
        hook = backbone.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        try:
            return plain(backbone, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(loop, "train_step", train_step)
    folder = distill(config)
    return rows, load_file(next((folder / "checkpoints").glob("step-*")) / "training.safetensors")


def test_conditional_and_null_rows_go_through_as_one_batch(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Per step: the student, teacher and fake model with guidance, and the fake model's own loss. Nothing else."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, fake={"updates": 2})
    rows, moments = passes(config, monkeypatch)
    assert rows == [2, 4, 4, 2, 2]
    assert moments["student.0.step"] == 1
    assert moments["fake.0.step"] == 2


def test_guidance_1_takes_no_null_rows(sd_folder, prompts_path, tmp_path, monkeypatch):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, guidance_scale=1.0, fake={"guidance_scale": 1.0})
    assert passes(config, monkeypatch)[0] == [2, 2, 2, 2]


def test_at_the_first_step_teacher_and_fake_model_agree(finished_run):
    first = stats_of(finished_run)[0]
    assert first["loss_student"] == 0
    assert all(value == 0 for name, value in first.items() if name.startswith("teacher_fake_distance"))
    assert stats_of(finished_run)[-1]["loss_student"] > 0


def test_the_student_is_asked_at_its_own_timestep(sd_folder, prompts_path, tmp_path, monkeypatch):
    """What is trained is what is drawn later: at the start, the network's answer at ``t*`` to the step's noise and prompts."""
    seen, plain = [], loop.train_step

    @torch.no_grad()
    def train_step(backbone, batch, timesteps, objective, config, state):
        with roles.active(backbone.network, None):
            prediction = backbone.predict(batch.z, torch.tensor([800] * 2), batch.condition)
        seen.append(backbone.process.x0(prediction, batch.z, torch.tensor([800] * 2)))
        with torch.enable_grad():
            return plain(backbone, batch, timesteps, objective, config, state)

    loss = vsd.gradient_loss
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(vsd, "gradient_loss", lambda x0, gradient: seen.append(x0.detach()) or loss(x0, gradient))
    distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, student={"timesteps": [800]}))
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_image_of_a_student_in_half_precision_uses_the_latents_that_its_network_sees(sd_folder, dtype):
    """The network predicts the noise of the rounded latents; with the others, 14.6 times the rounding would be in the image."""
    backbone = from_pipeline(load_pipeline(sd_folder, dtype))
    setup.attach_roles(backbone, with_defaults(DistillConfig(student=StudentConfig(rank=2), fake=FakeConfig(rank=2))))
    condition, z = backbone.encode(["red apple"]), noise(backbone.latent_shape, [0])
    assert not torch.equal(z, z.to(dtype).float())
    t = torch.tensor([999])
    networks = RoleNetworks(backbone, condition)
    with torch.no_grad():
        images = [networks.student(z, t, condition), one_step(backbone, condition, z, 999)]
        rounded = z.to(dtype).float()
        expected = backbone.process.x0(backbone.predict(rounded, t, condition), rounded, t)
    for image in images:
        assert_close(image, expected, rtol=0, atol=0)


def test_gradient_checkpointing_and_recomputing_change_memory_only(sd_folder, prompts_path, tmp_path):
    runs = [
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / name, **changes))
        for name, changes in (
            ("plain", {}),
            ("checkpointing", {"gradient_checkpointing": True}),
            ("recompute", {"recompute": True}),
        )
    ]
    plain, *others = (state_of(run)[0] for run in runs)
    for other in others:
        for name, value in plain.items():
            assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_what_a_run_leaves_behind(finished_run, sd_folder):
    names = {path.relative_to(finished_run).as_posix() for path in finished_run.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "stats.jsonl", "samples/step-0000000.png", "samples/step-0000003.png",
        *(f"{place}{role}/{file}" for place in ("", "checkpoints/step-0000003/") for role in ("student", "fake")
          for file in ("adapter_config.json", "adapter_model.safetensors")),
        "student/wadi.json", "fake/wadi.json",
        *(f"checkpoints/step-0000003/{file}" for file in ("training.safetensors", "state.json", "manifest.json")),
    }  # fmt: skip
    about = json.loads((finished_run / "student" / "wadi.json").read_text())
    assert (about["timesteps"], about["teacher"], about["step"]) == ([800], str(sd_folder), 3)
    assert [line["step"] for line in stats_of(finished_run)] == [1, 2, 3]
    assert load_config(finished_run / "config.yaml").student.timesteps == (800,)
    last = stats_of(finished_run)[-1]
    assert {"diversity_ratio", "contrast_ratio", "student_angle_rms", "fake_grad_norm", "skipped"} <= last.keys()


def test_the_moving_average_is_what_is_saved(sd_folder, prompts_path, tmp_path):
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", student={"ema": 0.9}))
    last, _ = checkpoint_folders.latest(run / "checkpoints")
    average = {k.removeprefix("ema."): v for k, v in load_file(last / "training.safetensors").items() if k.startswith("ema.")}
    saved = load_file(run / "student" / roles.WEIGHTS)
    live = load_file(last / "student" / roles.WEIGHTS)
    assert average.keys() == saved.keys() == live.keys()
    assert all(torch.equal(saved[key], average[key]) for key in saved)
    assert any(not torch.equal(saved[key], live[key]) for key in saved)


def test_a_finished_run_is_left_as_it_is(finished_run, monkeypatch):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    monkeypatch.setattr(loop, "train_step", lambda *a: pytest.fail("nothing is left to do"))
    distill(load_config(finished_run / "config.yaml"))
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before


# --- what is not finite -------------------------------------------------------------------------------------------------------


def nan_gradient(monkeypatch, steps):
    """The student's gradient is not a number at ``steps``; the fake model never notices."""
    plain, calls = vsd.vsd_gradient, []

    def vsd_gradient(*arguments):
        calls.append(None)
        return plain(*arguments) * (float("nan") if len(calls) - 1 in steps else 1)

    monkeypatch.setattr(vsd, "vsd_gradient", vsd_gradient)


def test_a_step_that_is_not_finite_is_left_out_and_counted(sd_folder, prompts_path, tmp_path, monkeypatch):
    nan_gradient(monkeypatch, {1})
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=3, checkpoint_every=1, keep_checkpoints=3))
    assert [line["skipped"] for line in stats_of(run)] == [0, 1, 1]
    assert "loss_student" not in stats_of(run)[1]  # no number is made of it
    saved = [
        {role: load_file(run / "checkpoints" / f"step-000000{n}" / role / roles.WEIGHTS) for role in ("student", "fake")}
        for n in (1, 2, 3)
    ]
    assert all(torch.equal(value, saved[1]["student"][key]) for key, value in saved[0]["student"].items())
    assert any(not torch.equal(value, saved[1]["fake"][key]) for key, value in saved[0]["fake"].items())
    assert any(not torch.equal(value, saved[2]["student"][key]) for key, value in saved[1]["student"].items())
    assert all(value.isfinite().all() for value in saved[2]["student"].values())


def test_one_role_that_stays_not_finite_stops_the_run(sd_folder, prompts_path, tmp_path, monkeypatch):
    """Though the other role's steps succeed in between."""
    nan_gradient(monkeypatch, set(range(1, 99)))
    config = tiny.settings(
        sd_folder, prompts_path, tmp_path / "run", steps=20, checkpoint_every=1, max_skipped=3, keep_checkpoints=1
    )
    with raises_naming("student", "step 3"):
        distill(config)
    last, complaints = checkpoint_folders.latest(tmp_path / "run" / "checkpoints")
    assert (last.name, complaints) == ("step-0000003", [])
    # the count is part of the state: the same command does not buy three more
    nan_gradient(monkeypatch, set(range(99)))
    with raises_naming("student", "step 3"):
        distill(config)


def test_a_finite_step_in_between_starts_the_count_anew(sd_folder, prompts_path, tmp_path, monkeypatch):
    nan_gradient(monkeypatch, {0, 1, 3, 4, 6})
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=8, max_skipped=3))
    assert [line["skipped"] for line in stats_of(run)] == [1, 2, 2, 3, 4, 4, 5, 5]


def test_angles_that_left_the_numbers_stop_the_run(sd_folder, prompts_path, tmp_path):
    with raises_naming("fake"):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=20, max_skipped=2, fake={"lr": 1e25}))
    assert checkpoint_folders.latest(tmp_path / "run" / "checkpoints") == (None, [])


# --- places and parts ---------------------------------------------------------------------------------------------------------


def test_a_mistyped_run_leaves_no_folder_that_refuses_the_right_one(sd_folder, prompts_path, tmp_path):
    wrong = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    for change in (
        {"teacher": str(tmp_path / "nowhere")}, {"prompts": str(tmp_path / "nowhere")}, {"device": "cuda:99"},
        {"tracker": "nonsense"}, {"student": dataclasses.replace(wrong.student, timesteps=(1000,))},
        {"student": dataclasses.replace(wrong.student, target_modules="nothing")}, {"resolution": (17, 16)},
    ):  # fmt: skip
        with pytest.raises(WadiError):
            distill(dataclasses.replace(wrong, **change))
        assert not (tmp_path / "run").exists(), change
    distill(wrong)


def test_a_folder_of_something_else_is_not_touched(sd_folder, prompts_path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with raises_naming(tmp_path / name):
            distill(tiny.settings(sd_folder, prompts_path, tmp_path / name))
    with raises_naming(tmp_path / "file"):
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / "file" / "run"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_tensorboard_gets_the_figures(sd_folder, prompts_path, tmp_path):
    pytest.importorskip("tensorboard")
    run = distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, tracker="tensorboard"))
    assert list(run.rglob("events.out.tfevents.*"))


def test_learning_rates(sd_folder, prompts_path):
    from types import SimpleNamespace

    from wadi.distill.optimizers import set_learning_rates

    config = tiny.settings("t", "p", "o", steps=10, lr_schedule="cosine", lr_warmup=1, student={"lr": 1.0}, fake={"lr": 10.0})
    rates = []
    for n in range(11):
        groups = {role: SimpleNamespace(param_groups=[{}]) for role in ("student", "fake")}
        set_learning_rates(SimpleNamespace(step=n, optimizers=groups), config, make_objective(config))
        rates.append([groups[role].param_groups[0]["lr"] for role in ("student", "fake")])
    assert all(fake == pytest.approx(10 * student) for student, fake in rates)
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * n / 10)) for n in range(11)]
    assert [student for student, _ in rates] == pytest.approx([0.5 * cosine[0], *cosine[1:]])
    assert rates[10][0] == pytest.approx(0.1)


def test_the_fake_model_can_learn_first_without_a_warm_start(sd_folder, prompts_path, tmp_path):
    """``warm_start.fake_steps`` needs no pairs: the fake model then learns the images of the student as it starts."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=2, warm_start={"fake_steps": 1})
    assert load_config(distill(config) / "config.yaml").warm_start.fake_steps == 1
    first, second = stats_of(tmp_path / "run")
    assert first["student_angle_max"] == 0 < first["fake_angle_max"]
    assert second["student_angle_max"] > 0


def test_a_run_of_an_earlier_version_with_a_weight_and_no_pairs_is_continued(sd_folder, prompts_path, tmp_path):
    """The weight had no effect; today it is refused."""
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1)
    distill(config)
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace("  weight: 0.0", "  weight: 0.5"))
    distill(dataclasses.replace(config, steps=2))
    assert state_of(tmp_path / "run")[1]["step"] == 2


# --- one role's update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_the_gradient_that_a_step_takes_is_no_longer_than_clip_whatever_the_loss_scale(loss_scale):
    """Plain descent at rate 1 moves the angles by the gradient itself. A scaled loss is unscaled before it is clipped."""
    from wadi.distill.optimizers import update
    from wadi.distill.state import TrainState

    for gradient, moved in ((torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])), (torch.tensor([0.03, 0.04]), None)):
        angle = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([angle], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale != 1)
        state = TrainState(None, {"fake": optimizer}, {"fake": scaler}, torch.Generator())
        scaler.scale((angle * gradient).sum()).backward()
        norm = update(state, "fake", tiny.settings("t", "p", "o", clip=0.5))
        assert_close(norm, gradient.norm())
        assert_close(-angle.detach(), gradient if moved is None else moved, rtol=1e-4, atol=1e-7)
