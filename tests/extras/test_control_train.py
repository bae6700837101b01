"""Training a ControlNet for a frozen teacher or student: losses, resuming, bad input; and the command line."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from backbones import small_pipelines
from raising import raises_naming
from wadi.backbones import from_pipeline
from wadi.cli.main import main
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.errors import Interrupted
from wadi.extras.control import data
from wadi.extras.control.config import ControlConfig
from wadi.extras.control.edges import soft_edges
from wadi.extras.control.load import load_control
from wadi.extras.control.loop import ControlTraining, learning_rate_share
from wadi.extras.control.losses import edge_loss, noisy_timesteps, student_x0, teacher_loss
from wadi.extras.control.network import controlnet_of, copy_into
from wadi.extras.control.pipeline import with_control
from wadi.extras.control.training import train_control
from wadi.io.tensors import read_with_metadata
from wadi.sampling import noise

PROMPTS = ["red apple", "blue car", "green tree"]


def small(out, **changes):
    return ControlConfig(
        **{"out": str(out), "pictures": 4, "picture_steps": 2, "steps": 4, "batch": 2, "save_every": 2, **changes}
    )


def teacher(folder, name="sd2"):
    return small_pipelines.make(name, folder)


def one_step(folder, name="sd2"):
    pipeline = small_pipelines.make(name, folder)
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 800)
    return pipeline


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_training_lowers_the_loss_and_leaves_the_network_alone(name, tmp_path):
    backbone = from_pipeline(teacher(tmp_path, name))
    network = backbone.network.requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    net = controlnet_of(network, backbone.scale, slim=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x0, z = noise(backbone.latent_shape, [1, 2]), noise(backbone.latent_shape, [3, 4])
    condition, image, t = backbone.encode(PROMPTS[:2]), torch.rand(2, 3, 16, 16).round(), torch.tensor([300, 900])
    losses = []
    for _ in range(30):
        loss = teacher_loss(backbone, net, x0, image, condition, z, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_the_student_learns_to_put_edges_where_they_belong(tmp_path):
    pipeline = one_step(tmp_path)
    backbone = from_pipeline(pipeline)
    backbone.network.requires_grad_(False)
    pipeline.vae.requires_grad_(False)
    net = controlnet_of(backbone.network, backbone.scale)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    target, x_t = 3 * noise(backbone.latent_shape, [1, 2]), noise(backbone.latent_shape, [3, 4])
    condition, image = backbone.encode(PROMPTS[:2]), torch.rand(2, 3, 16, 16).round()
    losses = []
    for _ in range(30):
        loss = edge_loss(backbone, student_x0(backbone, net, x_t, image, condition, 800), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert edge_loss(backbone, target, target) == 0
    one, other = (soft_edges(backbone.decode(latents)) for latents in (x_t, target))
    torch.testing.assert_close(edge_loss(backbone, x_t, target), (one - other).abs().mean())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGTERM, 3), (signal.SIGHUP, 7)])
def test_a_signal_saves_at_the_step_it_came_in(number, step, tmp_path, monkeypatch):
    """The code is 128 and the signal's number, in the last step too; the same command continues bit for bit."""
    pipe = teacher(tmp_path / "t")
    whole = weights(train_control(small(tmp_path / "whole", steps=8, save_every=100), pipe, PROMPTS))
    original = ControlTraining.loss

    def signalled(self, at):
        if at == step:
            os.kill(os.getpid(), number)
        return original(self, at)

    parts = small(tmp_path / "parts", steps=8, save_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(ControlTraining, "loss", signalled)
        with pytest.raises(Interrupted) as stopped:
            train_control(parts, pipe, PROMPTS)
    assert (stopped.value.signal, f"step {step + 1} of 8" in str(stopped.value)) == (number, True)
    assert not (tmp_path / "parts" / "controlnet").exists()
    counted = []
    monkeypatch.setattr(ControlTraining, "loss", lambda self, at: counted.append(at) or original(self, at))
    continued = weights(train_control(parts, pipe, PROMPTS))
    assert counted == list(range(step + 1, 8))
    assert all(torch.equal(continued[key], value) for key, value in whole.items())


@pytest.mark.parametrize("against_student", [False, True])
def test_an_interrupted_training_continues_bit_for_bit(against_student, tmp_path, monkeypatch):
    pipes = teacher(tmp_path / "t"), (one_step(tmp_path / "s") if against_student else None)
    changes = {"keep_weight": 0.1} if against_student else {}
    start = tmp_path / "start"
    controlnet_of(pipes[0].unet, 2).save_pretrained(start)

    def run(name):
        return train_control(
            small(tmp_path / name, **changes), pipes[0], PROMPTS, pipes[1], load_control(start) if against_student else None
        )

    whole = weights(run("whole"))
    original = ControlTraining.loss

    def stops(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(ControlTraining, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(ControlTraining, "loss", original)
    assert not (tmp_path / "parts" / "controlnet").exists()
    parts = weights(run("parts"))
    assert all(torch.equal(parts[key], value) for key, value in whole.items())
    first = weights(start)
    assert not all(torch.equal(first[key].half(), value) for key, value in whole.items() if key in first)


def test_what_was_trained_loads_and_steers(tmp_path):
    pipeline = teacher(tmp_path)
    folder = train_control(small(tmp_path / "run"), pipeline, PROMPTS)
    assert weights(folder)["conv_in.weight"].dtype == torch.float16
    assert all(p.grad is None for p in pipeline.unet.parameters()), "no gradient is computed for what is frozen"
    assert with_control(pipeline, folder).controlnet.config.down_block_types == ["DownBlock2D", "DownBlock2D"]


def test_other_settings_and_damage_are_rejected(tmp_path):
    pipeline, out = teacher(tmp_path), tmp_path / "run"
    train_control(small(out), pipeline, PROMPTS)
    train_control(small(out, save_every=1), pipeline, PROMPTS)  # how often it saves does not change the result
    with raises_naming("lr 0.001", 0.0001):
        train_control(small(out, lr=1e-4), pipeline, PROMPTS)
    with raises_naming("pictures 4", 5):
        train_control(small(out, pictures=5), pipeline, PROMPTS)
    for file in ("training.safetensors", "pictures.safetensors"):
        whole = (out / file).read_bytes()
        (out / file).write_bytes(whole[:100])
        with raises_naming(out / file):
            train_control(small(out), pipeline, PROMPTS)
        (out / file).write_bytes(whole)
    assert train_control(small(out), pipeline, PROMPTS) == out / "controlnet"


def test_other_prompts_of_the_same_number_are_another_training(tmp_path):
    pipeline, out = teacher(tmp_path), tmp_path / "run"
    folder = train_control(small(out), pipeline, PROMPTS)
    before = weights(folder)
    with raises_naming("violet", "pictures.safetensors"):
        train_control(small(out), pipeline, ["violet cup", "grey hat", "pink pig"])
    (out / "pictures.safetensors").unlink()  # new images do not continue the old training either
    with raises_naming("images"):
        train_control(small(out), pipeline, ["violet cup", "grey hat", "pink pig"])
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())


def test_another_start_is_another_training(tmp_path):
    pipeline, out = teacher(tmp_path), tmp_path / "run"

    train_control(small(out), pipeline, PROMPTS, start=_seeded(pipeline, 1))
    assert train_control(small(out), pipeline, PROMPTS, start=_seeded(pipeline, 1)) == out / "controlnet"
    for other in (_seeded(pipeline, 2), None):
        with raises_naming("start"):
            train_control(small(out), pipeline, PROMPTS, start=other)


def test_another_student_is_another_training(tmp_path):
    """Also one that differs in a single weight, far from the first values of any tensor."""
    pipeline, student, out = teacher(tmp_path / "t"), one_step(tmp_path / "s"), tmp_path / "run"
    train_control(small(out), pipeline, PROMPTS, student)
    assert train_control(small(out), pipeline, PROMPTS, student) == out / "controlnet"
    with torch.no_grad():
        student.unet.conv_in.weight.view(-1)[-1] += 1
    with raises_naming("student"):
        train_control(small(out), pipeline, PROMPTS, student)


def _seeded(pipeline, seed):
    torch.manual_seed(seed)
    return controlnet_of(pipeline.unet, 2)


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path):
    """Its note has neither images, start nor timestep."""
    from safetensors.torch import save_file

    pipeline, out = teacher(tmp_path), tmp_path / "run"
    train_control(small(out), pipeline, PROMPTS)
    state = out / "training.safetensors"
    tensors, about = read_with_metadata(state, "State", "")
    note = {name: value for name, value in json.loads(about["note"]).items() if name not in ("images", "start", "timestep")}
    save_file(tensors, state, {**about, "note": json.dumps(note)})
    assert train_control(small(out), pipeline, PROMPTS) == out / "controlnet"
    note["network"] = "0" * 16
    save_file(tensors, state, {**about, "note": json.dumps(note)})
    with raises_naming("network", "0" * 16):
        train_control(small(out), pipeline, PROMPTS)


def test_a_controlnet_from_elsewhere_is_not_overwritten(tmp_path):
    pipeline, out = teacher(tmp_path), tmp_path / "run"
    _seeded(pipeline, 3).save_pretrained(out / "controlnet")
    before = (out / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes()
    with raises_naming(out / "controlnet"):
        train_control(small(out), pipeline, PROMPTS)
    assert [path.name for path in out.iterdir()] == ["controlnet"], "rejected before any work"
    (out / "controlnet").rename(tmp_path / "mine")
    train_control(small(out), pipeline, PROMPTS)
    shutil.rmtree(out / "controlnet")
    (tmp_path / "mine").rename(out / "controlnet")  # put in the place of a finished training's result
    with raises_naming(out / "controlnet"):
        train_control(small(out), pipeline, PROMPTS)
    assert (out / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_more_steps_than_the_schedule_has(tmp_path):
    pipeline = teacher(tmp_path)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, num_train_timesteps=500)
    with raises_naming("picture_steps is 1000"):
        train_control(small(tmp_path / "run", picture_steps=1000), pipeline, PROMPTS)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_loses_nothing(tmp_path, full_disk):
    pipeline, out = teacher(tmp_path), tmp_path / "run"
    with full_disk(20_000), raises_naming(out):
        train_control(small(out), pipeline, PROMPTS)
    assert train_control(small(out), pipeline, PROMPTS).is_dir()


def test_networks_other_than_unets_are_rejected(tmp_path):
    with raises_naming("PixArtSigmaPipeline"):
        train_control(small(tmp_path / "run"), teacher(tmp_path, "pixart-sigma"), PROMPTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"batch": 0}, {"lr": 0}, {"drop": 1.5}, {"keep_weight": -1}, {"pictures": -3}, {"batch": 10**9},
        {"lr": float("nan")}, {"lr": float("inf")}, {"drop": float("nan")}, {"edge_weight": float("nan")}, {"seed": -1},
        {"guidance_scale": float("inf")}, {"guidance_scale": float("nan")}, {"picture_steps": 1001}, {"seed": 2**60},
    ],
)  # fmt: skip
def test_settings_are_checked(changes):
    ((name, value),) = changes.items()
    with raises_naming(f"{name} is {value}"):
        ControlConfig(**changes)


def test_the_rate_rises_and_falls_and_noisy_timesteps_come_more_often():
    rates = [learning_rate_share(step, 200) for step in range(200)]
    assert rates[0] < 0.05 < 0.9 < max(rates)
    assert rates[-1] < 0.001
    t = noisy_timesteps(4000, 1000, torch.Generator().manual_seed(0))
    assert 0 <= t.min() <= t.max() <= 999
    assert t.float().mean() == pytest.approx(750, abs=15)  # E (1 - u^3) = 3/4


def test_weights_are_copied_only_where_they_fit(tmp_path):
    unet = teacher(tmp_path).unet
    net = controlnet_of(unet, 2)
    assert torch.equal(net.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv1.weight)
    assert not any(p.any() for p in net.controlnet_down_blocks.parameters())
    assert copy_into(controlnet_of(unet, 2, slim=True), unet) < copy_into(net, unet)
    with raises_naming(16):
        controlnet_of(unet, 16)


def test_each_training_image_has_noise_of_its_own(tmp_path):
    backbone = from_pipeline(teacher(tmp_path))
    some = data.generate_images(backbone, PROMPTS, 5, 2, 2.0, batch=2)
    later = data.generate_images(backbone, PROMPTS[1:], 6, 2, 2.0)
    torch.testing.assert_close(some.latents[1:], later.latents, atol=2e-3, rtol=0)
    assert some.edges.shape == (3, 1, 16, 16)
    assert some.conditions(torch.tensor([0, 2])).shape == (2, 3, 16, 16)
    data.save_images(tmp_path / "p.safetensors", some, "note")
    loaded = data.load_images(tmp_path / "p.safetensors", ("newer", "note"), PROMPTS)
    with raises_naming("newer"):
        data.load_images(tmp_path / "p.safetensors", ("newer",), PROMPTS)
    assert torch.equal(loaded.edges, some.edges)
    assert loaded.prompts == PROMPTS
    counts = [data.shuffled_prompts(PROMPTS, 7, 0).count(p) for p in PROMPTS]
    assert sorted(counts) == [2, 2, 3]


# --- command line -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sd_folder, prompts_path):
    out = tmp_path_factory.mktemp("control")
    files = ["--teacher", str(sd_folder), "--prompts", str(prompts_path), "--out", str(out)]
    sizes = ["--pictures", "4", "--picture-steps", "2", "--steps", "2", "--batch", "2", "--device", "cpu"]
    assert main(["control", "train", *files, *sizes]) == 0
    return out / "controlnet"


def test_tune_and_eval_by_command(trained, finished_run, sd_folder, prompts_path, tmp_path, capsys):
    common = ["--teacher", str(sd_folder), "--prompts", str(prompts_path), "--student", str(finished_run)]
    tuned = [
        "--start",
        str(trained),
        "--out",
        str(tmp_path / "tuned"),
        "--pictures",
        "2",
        "--picture-steps",
        "1",
        "--steps",
        "1",
    ]
    assert main(["control", "train", *common, *tuned, "--batch", "2", "--device", "cpu"]) == 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: wadi control eval -->\nold\n<!-- /table -->\nafter\n")
    files = ["--json", str(tmp_path / "scores.json"), "--picture", str(tmp_path / "grid.png"), "--page", str(page)]
    sizes = ["--sets", "2", "--count", "2", "--steps", "2", "--strengths", "1.0"]
    capsys.readouterr()
    code = main(
        [
            "control",
            "eval",
            *common,
            "--control",
            str(trained),
            "--tuned",
            str(tmp_path / "tuned" / "controlnet"),
            *sizes,
            *files,
        ]
    )
    assert code == 0
    table = capsys.readouterr().out.strip()
    assert page.read_text() == f"before\n<!-- table: wadi control eval -->\n{table}\n<!-- /table -->\nafter\n"
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [len(scores), len(table.splitlines())] == [5, 7]
    assert all(0 <= score["f1"] <= 1 and score["ms"] > 0 and score["named"] is None for score in scores)
    assert Image.open(tmp_path / "grid.png").width > 100


def test_a_condition_by_command(tmp_path, capsys):
    Image.fromarray(np.kron([[0, 1], [1, 0]], np.ones((16, 16))).astype(np.uint8) * 255).save(tmp_path / "in.png")
    out = tmp_path / "edges.png"
    assert main(["control", "condition", str(tmp_path / "in.png"), "--size", "16x16", "--out", str(out)]) == 0
    assert Image.open(out).size == (16, 16)
    assert np.asarray(Image.open(out)).max() == 255


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["nonsense"], "nonsense"),
        (["condition", "missing.png"], "does not exist"),
        (["condition", "missing.png", "--size", "12"], "does not exist"),
        (["train", "--steps", "0"], "steps is 0"),
        (["train", "--start", "./nowhere"], "does not exist"),
        (["eval", "--sets", "0"], "--sets"),
        (["eval", "--count", "1"], "--count"),
        (["eval", "--strengths", "nan"], "nan"),
        (["eval", "--strengths", "1", "2.5"], "2.5"),
        (["eval", "--guidance-scale", "inf"], "guidance-scale"),
        (["eval", "--json", "/proc/none/x.json"], "/proc/none/x.json"),
        (["eval", "--picture", "x.jpg"], "x.jpg"),
        (["eval", "--page", "/nowhere.md"], "/nowhere.md"),
        (["condition", "missing.png", "--out", "x.jpg"], "x.jpg"),
        (["train", "--out", "/proc/none"], "/proc/none"),
        (["train", "--guidance-scale", ".nan"], "guidance_scale"),
    ],
)
def test_bad_command_lines_end_in_one_line(line, named, capsys):
    """Before anything is loaded or generated."""
    assert main(["control", *line]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_usage(capsys):
    assert main(["control"]) == 2
    assert main(["control", "--help"]) == 0
    assert "train" in capsys.readouterr().out
