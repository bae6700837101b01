"""How fast do pipelines draw? Measured side by side in one run, in turns, so that a slow minute of the machine meets all alike.

Latency is the time of one image asked for alone; images per second are those of a batch. Both include everything a call does:
text encoding, network, decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Args:
        call: draws as many images as it is told.
        network: the one whose evaluations are counted.
        modules: all that a call uses, for the number of parameters.
    """

    call: Callable[[int], Any]
    network: nn.Module
    modules: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Of one subject. ``evaluations`` counts rows through the network per image: guidance doubles them.

    ``peak_memory_mib`` is the device's on a GPU and the whole process's resident memory on Linux CPUs; None where neither can
    be told.
    """

    name: str
    images_per_second: float
    latency_p50_ms: float
    latency_p95_ms: float
    peak_memory_mib: float | None
    parameters: int
    evaluations: float
    repeats: int
    batch: int


def measure(
    subjects: Mapping[str, Subject], repeats: int = 20, batch: int = 8, device: str | torch.device = "cpu", warmup: int = 1
) -> list[Speed]:
    """Time each subject ``repeats`` times alone and in batches, taking turns.

    Args:
        repeats: calls of each kind per subject; the 95th percentile of fewer than 20 is their maximum.
        warmup: calls of each kind before any is timed.
    Raises:
        WadiError: if there is nothing to measure.
    """
    if not subjects or repeats < 1 or batch < 1:
        raise WadiError(
            f"Received {len(subjects)} pipelines, {repeats} repeats and batch {batch}. Expected at least 1 of each."
        )
    device = torch.device(device)
    evaluations, memory = {}, {}
    for name, subject in subjects.items():
        for _ in range(warmup):
            subject.call(batch)
        with counted(subject.network) as count:
            subject.call(1)
        evaluations[name] = float(count.rows)
        memory[name] = _peak_memory(subject, batch, device)
    single: dict[str, list[float]] = {name: [] for name in subjects}
    batched: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, subject in subjects.items():
            single[name].append(_seconds(subject, 1, device))
            batched[name].append(_seconds(subject, batch, device))
    return [
        Speed(
            name,
            batch / statistics.median(batched[name]),
            1000 * percentile(single[name], 0.5),
            1000 * percentile(single[name], 0.95),
            memory[name],
            parameters((subject.network, *subject.modules)),
            evaluations[name],
            repeats,
            batch,
        )
        for name, subject in subjects.items()
    ]


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def parameters(modules: Iterable[nn.Module]) -> int:
    """Numbers in all parameters, shared ones counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


@dataclass
class Count:
    """Calls of a network and rows (first dimension of its first tensor) that went through it."""

    calls: int = 0
    rows: int = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Count]:
    """Count what goes through ``network`` inside the block."""
    count = Count()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
        count.calls += 1
        count.rows += len(first)

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def _seconds(subject: Subject, count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    subject.call(count)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(subject: Subject, batch: int, device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        subject.call(batch)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of this process starts anew
        subject.call(batch)
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
