"""Memory that runs out is one line that says what would fit, and the run then continues with it."""

import dataclasses
import re

import pytest
import torch
from torch.testing import assert_close

import tiny
from raising import raises_naming
from runs import assert_same_run, at_steps, state_of
from wadi.backbones import load_pipeline
from wadi.cli import main
from wadi.distill import config_files, loop
from wadi.distill.loop import distill
from wadi.distill.plan import fitting
from wadi.distill.plan.architecture import read_architecture
from wadi.distill.plan.plan import plan_run
from wadi.parallel.device import OutOfMemory, out_of_memory, total_memory
from wadi.pipelines import generate

CPU = torch.device("cpu")


def allocate():
    torch.empty(2**50)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(), OSError(12, "Cannot allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_ways_in_which_libraries_say_it(error):
    assert out_of_memory(error)


def test_the_cpu_says_it_in_its_own_way():
    with pytest.raises(RuntimeError) as raised:
        allocate()
    assert out_of_memory(raised.value)
    assert not any(
        map(out_of_memory, (RuntimeError("shape mismatch"), ValueError("out of memory"), FileNotFoundError(2, "no")))
    )


def test_a_driver_that_fails_is_not_taken_for_damaged_files(sd_folder, monkeypatch):
    from diffusers import DiffusionPipeline

    message = "CUDA error: no kernel image is available for execution on the device"

    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(DiffusionPipeline, "to", fail)
    with pytest.raises(RuntimeError) as raised:
        load_pipeline(sd_folder)
    assert str(raised.value) == message


def test_a_run_that_ran_out_of_memory_continues_with_less(sd_folder, prompts_path, tmp_path, monkeypatch):
    """The checkpoint before stays; gradient checkpointing leaves the rest of the run as it would have been, bit for bit."""
    full = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=4, checkpoint_every=2)
    with monkeypatch.context() as patch:
        at_steps(patch, [2], allocate)
        with raises_naming("step 2 ", "batch 2", error=OutOfMemory):
            distill(full)
    assert state_of(tmp_path / "run")[1]["step"] == 2
    distill(dataclasses.replace(full, gradient_checkpointing=True))
    distill(dataclasses.replace(full, out=str(tmp_path / "straight")))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradient_checkpointing_changes_no_bit(dtype, sd_folder, prompts_path, tmp_path):
    runs = [
        distill(tiny.settings(sd_folder, prompts_path, tmp_path / str(on), steps=2, dtype=dtype, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert_same_run(*runs)


def test_only_what_keeps_the_result_may_change(sd_folder, prompts_path):
    one = tiny.settings(sd_folder, prompts_path, "o")
    free = {"gradient_checkpointing": True, "recompute": True, "batch": 1, "accumulate": 2}
    assert config_files.changed_settings(one, dataclasses.replace(one, **free)) == []
    assert config_files.changed_settings(one, dataclasses.replace(one, eps=1e-6)) == ["eps: 1e-08 -> 1e-06"]


def test_a_run_that_ran_out_of_memory_continues_with_recomputed_weights(sd_folder, prompts_path, tmp_path):
    config = tiny.settings(sd_folder, prompts_path, tmp_path / "run", steps=1, checkpoint_every=1, lr_schedule="constant")
    distill(config)
    whole = distill(dataclasses.replace(config, out=str(tmp_path / "whole"), steps=2))
    distill(dataclasses.replace(config, steps=2, recompute=True))
    for name, value in state_of(whole)[0].items():
        assert_close(state_of(tmp_path / "run")[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def planned(sd_folder, prompts_path):
    """``(config, architecture, bytes)`` of a run with batch 8; ``bytes[batch, checkpointing, recompute]`` are the plan's."""
    run = tiny.settings(sd_folder, prompts_path, "o", batch=8)
    architecture, sizes = read_architecture(run.teacher), {}
    for batch, recompute in ((1, False), (4, False), (8, False), (1, True), (8, True)):
        memory = plan_run(dataclasses.replace(run, batch=batch, recompute=recompute), architecture).memory
        sizes |= {(batch, on, recompute): memory["checkpointed" if on else "plain"].total for on in (False, True)}
    return run, architecture, sizes


@pytest.fixture
def quick(planned, monkeypatch):
    """`planned`, where a plan is looked up instead of made."""
    from types import SimpleNamespace

    run, architecture, sizes = planned

    def look_up(config, architecture, processes):
        both = {name: sizes[config.batch, on, config.recompute] for name, on in (("checkpointed", True), ("plain", False))}
        return SimpleNamespace(memory={name: SimpleNamespace(total=size) for name, size in both.items()})

    monkeypatch.setattr(fitting.plan, "plan_run", look_up)
    return run, architecture, sizes


def test_between_two_batches_the_estimate_is_close_and_not_too_low(quick):
    run, architecture, sizes = quick
    line = fitting.Estimate.of(run, architecture)
    for on in (False, True):
        assert sizes[4, on, False] <= line.bytes_at(4, on) <= 1.1 * sizes[4, on, False]
        assert (line.bytes_at(1, on), line.bytes_at(8, on)) == (sizes[1, on, False], sizes[8, on, False])


def test_the_command_says_what_would_fit(quick, tmp_path, monkeypatch, capsys):
    run, architecture, _ = quick
    line = fitting.Estimate.of(run, architecture)
    room = round((line.bytes_at(4, False) + 1) / fitting.USABLE)
    monkeypatch.setattr(fitting, "total_memory", lambda device: room)
    at_steps(monkeypatch, [0], allocate)
    config_files.save_config(dataclasses.replace(run, out=str(tmp_path / "run")), tmp_path / "c.yaml")
    assert main.main(["distill", "--config", str(tmp_path / "c.yaml")]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{line.bytes_at(8, False) / 2**30:.1f} GiB" in message
    assert "--batch 4 --accumulate 2" in message


def test_each_offer_fits_and_keeps_the_images_per_step(quick):
    run, architecture, _ = quick
    plain = fitting.Estimate.of(run, architecture)
    both = fitting.Estimate.of(dataclasses.replace(run, recompute=True), architecture)
    rooms = {n: round((plain.bytes_at(n, on) + 1) / fitting.USABLE) for n in (1, 2, 4) for on in (False, True)}
    rooms["recompute"] = round((min(both.bytes_at(1, on) for on in (False, True)) + 1) / fitting.USABLE)
    flags = set()
    for room in rooms.values():
        for offer in fitting.fitting_options(run, architecture, room):
            values = dict(re.findall(r"--([\w-]+) (\w+)", offer))
            flags |= values.keys()
            assert int(values.get("batch", 8)) * int(values.get("accumulate", 1)) == 8
            line = both if "recompute" in values else plain
            size = line.bytes_at(int(values.get("batch", 8)), "gradient-checkpointing" in values)
            assert size <= fitting.USABLE * room
            assert f"{size / 2**30:.1f} GiB" in offer
    assert {"batch", "gradient-checkpointing"} <= flags


def test_nothing_fits_and_nothing_is_known(quick, monkeypatch):
    run = quick[0]
    monkeypatch.setattr(fitting, "total_memory", lambda device: 1)
    assert "--resolution" in fitting.suggest_settings(run, CPU)
    assert fitting.suggest_settings(dataclasses.replace(run, teacher="/nowhere"), CPU) == ""


def test_the_cpus_memory_is_what_this_process_may_use():
    import resource

    assert 2**28 < total_memory(CPU) < 2**50
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**45, hard))
    try:
        assert total_memory(CPU) <= 2**45
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_generating_says_how_many_images_were_too_many(sd_folder, monkeypatch):
    pipeline = load_pipeline(sd_folder)
    monkeypatch.setattr(type(pipeline), "__call__", lambda *a, **b: allocate())
    with raises_naming(3, "--batch"):
        generate.generate_images(pipeline, ["a"] * 3, [0, 1, 2])


def test_another_error_stays_what_it_is(sd_folder, prompts_path, tmp_path, monkeypatch):
    defect = RuntimeError("a defect")

    def fail():
        raise defect

    at_steps(monkeypatch, [0], fail)
    with pytest.raises(RuntimeError) as raised:
        loop.distill(tiny.settings(sd_folder, prompts_path, tmp_path / "run"))
    assert raised.value is defect
