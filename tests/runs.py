"""What runs left behind, compared without their times; and what interrupts them."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from wadi.distill import checkpoint_folders, loop

TIMES = {"seconds", "images_per_second", "peak_memory_mib", "student_ms_per_image", "teacher_ms_per_image"}
WARM = {"pairs": 3, "sampler_steps": 2, "steps": 2, "fake_steps": 1, "weight": 0.5}


def stats_of(run):
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def state_of(run):
    """Everything the last checkpoint and the saved adapters hold, times apart."""
    last, _ = checkpoint_folders.latest(run / "checkpoints")
    tensors = {}
    for place in (last, run):
        for file in (*place.glob("*.safetensors"), *place.glob("*/*.safetensors")):
            where = f"{place.relative_to(run).parent}/{file.relative_to(place)}"
            tensors |= {f"{where}: {name}": value for name, value in load_file(file).items()}
    plain = json.loads((last / "state.json").read_text())
    return tensors, {name: value for name, value in plain.items() if name != "seconds"}


def assert_same_run(one, other):
    (tensors, plain), (others, other_plain) = state_of(one), state_of(other)
    assert plain == other_plain
    assert tensors.keys() == others.keys()
    different = [name for name, value in tensors.items() if not torch.equal(value, others[name])]
    assert different == []
    assert stats_of(one) == stats_of(other)


def at_steps(monkeypatch, steps, act):
    """Call ``act()`` at the start of each of ``steps`` (counted from 0), once each."""
    plain, left = loop.train_step, set(steps)

    def train_step(backbone, batch, timesteps, objective, config, state):
        if state.step in left:
            left.remove(state.step)
            act()
        return plain(backbone, batch, timesteps, objective, config, state)

    monkeypatch.setattr(loop, "train_step", train_step)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
