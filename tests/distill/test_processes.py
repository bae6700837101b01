"""Several processes are one run: the same numbers, stopped and resumed together, and told when one is lost."""

import dataclasses
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import tiny
from processes import distilled, finish, free_port, start, stopped_at
from runs import assert_same_run, state_of, stats_of
from wadi.distill import checkpoint_folders
from wadi.distill.random_draws import Random
from wadi.distill.state import TrainState
from wadi.parallel.ranks import Ranks
from wadi.prompts.order import PromptOrder

WARM = {"pairs": 5, "sampler_steps": 2, "steps": 2, "fake_steps": 1, "weight": 0.5}


def settings(sd_folder, prompts_path, out, **changes):
    """Six images a step on one process: the warm start's three pairs do not divide among two."""
    return tiny.settings(
        sd_folder, prompts_path, out,
        **{"steps": 5, "batch": 6, "warm_start": WARM, "fake": {"updates": 2, "lr": 1e-3}, "student": {"ema": 0.9}, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(sd_folder, prompts_path, tmp_path_factory):
    """The run on one process."""
    place = tmp_path_factory.mktemp("alone")
    config = settings(sd_folder, prompts_path, place / "run")
    assert finish(start(1, distilled, config, log=place / "log")) == [0], (place / "log-0").read_text()
    return place / "run"


def assert_close_runs(one, other, rtol=2e-3):
    """In losses and angles, to float32: AdamW's step hardly depends on a gradient's size, so small differences show."""
    (tensors, plain), (others, other_plain) = state_of(one), state_of(other)
    assert plain == other_plain
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        if "lorad" in name:
            assert_close(others[name], value, rtol=rtol, atol=2e-5, msg=lambda told, name=name: f"{name}: {told}")
        elif name.endswith(": generator"):
            assert torch.equal(others[name], value)
    lines, other_lines = stats_of(one), stats_of(other)
    assert len(lines) == len(other_lines)
    for line, other_line in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other_line, rel=rtol, abs=1e-5)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"batch": 3}), (1, {"batch": 2, "accumulate": 3}), (2, {"batch": 1, "accumulate": 3}),
        (2, {"batch": 3, "shard": True}),
        (2, {"batch": 3, "shard": True, "gradient_checkpointing": True, "recompute": True}),
    ],
    ids=["two processes", "accumulated", "both", "sharded", "sharded, recomputing"],
)  # fmt: skip
def test_a_step_is_the_same_however_its_images_are_shared(world, changes, alone, sd_folder, prompts_path, tmp_path):
    config = settings(sd_folder, prompts_path, tmp_path / "run", **changes)
    codes = finish(start(world, distilled, config, log=tmp_path / "log"))
    assert codes == [0] * world, (tmp_path / "log-0").read_text()
    assert_close_runs(alone, tmp_path / "run")


def distilled_in_small_parts(config, *rest):
    from wadi.distill import warm_start

    warm_start.BATCH = 2
    return distilled(config, *rest)


@pytest.mark.parametrize("shard", [False, True])
def test_each_process_makes_its_share_of_the_pairs(shard, alone, sd_folder, prompts_path, tmp_path):
    """Three parts on two processes: the second has one less, and repeats one to keep step."""
    config = settings(sd_folder, prompts_path, tmp_path / "run", batch=3, shard=shard)
    codes = finish(start(2, distilled_in_small_parts, config, log=tmp_path / "log"))
    assert codes == [0, 0], (tmp_path / "log-0").read_text()
    assert_close_runs(alone, tmp_path / "run")


@pytest.mark.parametrize(("student", "fake"), [("full", "dora-frozen"), ("hra", "lora")])
def test_other_adapters_share_and_shard_their_steps_too(student, fake, sd_folder, prompts_path, tmp_path):
    """Sharded, the teacher's weights are gathered for the change of the weights as well."""
    few = {"target_modules": r".*attn\d\.to_(q|k)", "rank": 2}
    changes = {"student": {"adapter": student, **few}, "fake": {"adapter": fake, **few}, "steps": 3}
    changes["warm_start"] = {"pairs": 0, "steps": 0, "fake_steps": 0, "weight": 0.0}
    for name, world, own in (("alone", 1, {}), ("shared", 2, {"batch": 3, "shard": True})):
        config = settings(sd_folder, prompts_path, tmp_path / name, **changes, **own)
        codes = finish(start(world, distilled, config, log=tmp_path / f"{name}-log"))
        assert codes == [0] * world, (tmp_path / f"{name}-log-0").read_text()
    assert_close_runs(tmp_path / "alone", tmp_path / "shared")
    assert stats_of(tmp_path / "alone")[-1]["student_direction_change"] > 0
    (tensors, _), (others, _) = state_of(tmp_path / "alone"), state_of(tmp_path / "shared")
    adapters = [name for name in tensors if ": base_model" in name]
    assert any("magnitude" in name or "hra" in name for name in adapters)
    for name in adapters:  # a tenth of AdamW's first step: the sign of a tiny gradient may be rounding
        assert_close(others[name], tensors[name], rtol=2e-3, atol=1e-4)


def test_several_steps_are_the_same_sharded(sd_folder, prompts_path, tmp_path):
    """With one image on each process, some steps have no image that needs a later timestep on one of them."""
    changes = {"student": {"timesteps": [999, 749, 499, 249], "rank": 2}, "steps": 4}
    changes["warm_start"] = {"pairs": 0, "steps": 0, "fake_steps": 0, "weight": 0.0}
    for name, world, own in (("alone", 1, {"batch": 2}), ("shared", 2, {"batch": 1, "shard": True})):
        config = settings(sd_folder, prompts_path, tmp_path / name, **changes, **own)
        codes = finish(start(world, distilled, config, log=tmp_path / f"{name}-log"))
        assert codes == [0] * world, (tmp_path / f"{name}-log-0").read_text()
    losses = [[line["loss_student"] for line in stats_of(tmp_path / name)] for name in ("alone", "shared")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_run_on_two_is_stopped_by_one_and_resumes_to_the_bit(alone, sd_folder, prompts_path, tmp_path):
    straight, broken = (settings(sd_folder, prompts_path, tmp_path / name, batch=3) for name in ("straight", "broken"))
    one = start(2, distilled, straight, log=tmp_path / "log")
    two = start(2, stopped_at, broken, 2, 1, signal.SIGTERM, log=tmp_path / "first")
    assert finish(two) == [128 + signal.SIGTERM] * 2, (tmp_path / "first-0").read_text()
    assert checkpoint_folders.latest(tmp_path / "broken" / "checkpoints")[0].name == "step-0000003"
    wrong = dataclasses.replace(broken, batch=4)
    assert finish(start(2, distilled, wrong, log=tmp_path / "wrong")) == [2, 2]
    complaint = (tmp_path / "wrong-0").read_text()
    assert re.findall(r"\b[68]\b", complaint) == ["6", "8"], complaint
    assert finish(start(2, distilled, broken, log=tmp_path / "second")) == [0, 0]
    assert finish(one) == [0, 0]
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


def test_a_checkpoint_of_two_goes_on_on_one(alone, sd_folder, prompts_path, tmp_path):
    config = settings(sd_folder, prompts_path, tmp_path / "run", batch=3)
    stopped = finish(start(2, stopped_at, config, 3, 0, signal.SIGTERM, log=tmp_path / "log"))
    assert stopped == [128 + signal.SIGTERM] * 2, (tmp_path / "log-0").read_text()
    assert finish(start(1, distilled, dataclasses.replace(config, batch=6), log=tmp_path / "log")) == [0]
    assert_close_runs(alone, tmp_path / "run")


def test_a_process_that_dies_ends_the_run_with_a_line(sd_folder, prompts_path, tmp_path):
    config = settings(sd_folder, prompts_path, tmp_path / "run", batch=1, steps=6, checkpoint_every=1)
    codes = finish(start(2, stopped_at, config, 3, 1, signal.SIGKILL, log=tmp_path / "log"))
    assert codes == [2, -signal.SIGKILL]
    assert "Traceback" not in (tmp_path / "log-0").read_text()
    found, complaints = checkpoint_folders.latest(tmp_path / "run" / "checkpoints")
    assert (found.name, complaints) == ("step-0000003", [])


def rank(count, index):
    """Return process ``index`` of ``count``, without a process group."""
    return Ranks(count, index)


@pytest.mark.parametrize("step", [0, 2], ids=["warm start", "later"])
def test_each_process_has_its_own_prompts_and_noise_and_all_of_them_the_step_s(step, sd_folder, prompts_path):
    from types import SimpleNamespace

    from wadi.backbones import Condition
    from wadi.distill import batch as draws
    from wadi.distill.warm_start import Pairs

    config = tiny.settings(sd_folder, prompts_path, "o", batch=3, warm_start=WARM)

    class Conditions:
        backbone = SimpleNamespace(device=torch.device("cpu"), latent_shape=(4, 2, 2))

        def __call__(self, rows):
            return Condition({"rows": rows.float().unsqueeze(1)})

    gaussian = torch.Generator().manual_seed(1)
    pairs = Pairs(*(torch.randn(5, 4, 2, 2, generator=gaussian) for _ in range(2)), torch.arange(5) + 100)

    def drawn(count, index, batch):
        state = TrainState(None, {}, {}, torch.Generator().manual_seed(7), step=step, ranks=rank(count, index))
        own = draws.draw_batch(Conditions(), PromptOrder(9, 3), None, pairs, dataclasses.replace(config, batch=batch), state)
        random = Random(state.generator, state.ranks)
        return own, random.integers(0, 1000, own.z), random.gaussian(own.z), state.prompts_drawn

    whole, *shares = drawn(1, 0, 6), drawn(2, 0, 3), drawn(2, 1, 3)
    batches = [share[0] for share in shares]
    assert torch.equal(torch.cat([batch.z for batch in batches]), whole[0].z)
    assert torch.equal(torch.cat([batch.target for batch in batches]), whole[0].target)
    assert torch.equal(torch.cat([batch.condition.tensors["rows"] for batch in batches]), whole[0].condition.tensors["rows"])
    for index in (1, 2):
        assert torch.equal(torch.cat([share[index] for share in shares]), whole[index])
        assert not torch.equal(shares[0][index], shares[1][index])
    assert {share[3] for share in shares} == {whole[3]}
    assert {batch.paired for batch in batches} == {6 if step == 0 else 3}
    rows = whole[0].condition.tensors["rows"].flatten()
    assert len(whole[0].target) == int((rows >= 100).sum()) == (6 if step == 0 else 3)
    assert len(set(whole[0].z.flatten().tolist())) > 30  # no row drawn twice


LAUNCHERS = {
    # its --cpu starts one process, whatever --num_processes says; the config's device is what keeps this on the CPU
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no "
    "--dynamo_backend no --main_process_port",
    "torchrun": "torch.distributed.run --nproc_per_node 2 --master_port",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_launcher_of_ours_is_needed(launcher, alone, sd_folder, prompts_path, tmp_path):
    from wadi.distill.config_files import save_config

    save_config(settings(sd_folder, prompts_path, tmp_path / "run", batch=3), tmp_path / "c.yaml")
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split(), str(free_port()), "-m", "wadi", "distill"]
    done = subprocess.run([*command, "--config", str(tmp_path / "c.yaml")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1  # the first process tells
    assert_close_runs(alone, tmp_path / "run")
