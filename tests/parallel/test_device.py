"""Which device is chosen, and that nothing of a step needs what Apple's GPUs lack. (No such GPU is needed for these tests.)"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raising import raises_naming
from wadi.diffusion.process import Process
from wadi.distill import health
from wadi.parallel.device import find_device


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_there_is(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device(None) == torch.device(chosen)


@pytest.mark.parametrize("name", ["mps", "cuda:99", "gpu", "npu:0"])
def test_a_device_that_is_not_there_is_named(name):
    with raises_naming(name):
        find_device(name)


class NoFloat64(TorchDispatchMode):
    """Fails as an Apple GPU does on a tensor of 64-bit floats there; the meta device stands in for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" and leaf.dtype == torch.float64:
                raise AssertionError(f"{func} makes float64 on the device")
        return out


@pytest.mark.parametrize("flow", [False, True], ids=["variance preserving", "flow"])
def test_the_process_needs_no_float64_on_the_device(flow):
    with NoFloat64():
        alphas = None if flow else torch.linspace(0.99, 0.1, 10)
        t, x = torch.empty(3, dtype=torch.long, device="meta"), torch.empty(3, 4, 2, 2, device="meta")
        process = Process("velocity" if flow else "epsilon", 10, alphas)
        for made in (process.add_noise(x, x, t), process.x0(x, x, t), process.eps(x, x, t), process.join(x, x, t)):
            assert (made.device.type, made.dtype) == ("meta", torch.float32)


def test_the_process_is_the_same_to_the_bit():
    """``sigma`` is taken from a table of float64 square roots, as it was computed element by element before."""
    alphas = torch.linspace(0.9999, 0.02, 1000)
    t = torch.arange(1000)
    before = (1 - alphas[t].double() ** 2).sqrt().float()
    assert torch.equal(Process("epsilon", 1000, alphas).sigma(t), before)


def test_angle_stats_need_no_float64_on_the_device(monkeypatch):
    with NoFloat64():
        theta = torch.empty(4, 3, device="meta")
        monkeypatch.setattr(health, "layer_angles", lambda *a: [("a", theta), ("b", theta)])
        with pytest.raises(NotImplementedError):  # it got as far as reading the numbers
            health.angle_stats(torch.nn.Identity(), "student")


def test_angle_stats_by_hand(monkeypatch):
    one, two = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.0005, 0.0], [1.0, 0.25]])
    monkeypatch.setattr(health, "layer_angles", lambda *a: [("a", one), ("b", two)])
    stats = health.angle_stats(torch.nn.Identity(), "student")
    everything = torch.cat([one.flatten(), two.flatten()])
    assert stats["student_angle_max"] == 2
    assert stats["student_angle_rms"] == pytest.approx(float(everything.square().mean().sqrt()), rel=1e-6)
    assert stats["student_angle_share_above_1e-3"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("home", [None, "/proc"], ids=["not set", "cannot be written"])
def test_without_a_home_folder(home, finished_run, tmp_path):
    """Caches of libraries live there; a command that has its model locally works without."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HOME", "XDG_", "MPLCONFIGDIR"))}
    variables.pop("HOME")
    if home is not None:
        variables["HOME"] = home
    out = str(tmp_path / "a.png")
    command = ["-m", "wadi", "generate", "red apple", "--run", str(finished_run), "--out", out, "--device", "cpu"]
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
    assert "Traceback" not in done.stderr
