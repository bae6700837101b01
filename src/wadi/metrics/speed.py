"""Speed of pipelines. All are timed in one run and take turns, so a slow minute of the machine affects all of them alike.

Latency is the time of one image generated alone. Images per second are those of a batch. Both include everything a call does:
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
class TimedPipeline:
    """A pipeline to be timed.

    Args:
        call: generates as many images as its argument says.
        network: the one whose evaluations are counted.
        modules: all modules that a call uses, for the number of parameters.
    """

    call: Callable[[int], Any]
    network: nn.Module
    modules: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Speed:
    """The speed of one pipeline. ``evaluations`` counts rows through the network for each image, so guidance doubles them.

    ``peak_memory_mib`` is the device's memory on a GPU, and the resident memory of the whole process on Linux CPUs; None
    elsewhere.
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


def measure_speed(
    pipelines: Mapping[str, TimedPipeline],
    repeats: int = 20,
    batch: int = 8,
    device: str | torch.device = "cpu",
    warmup: int = 1,
) -> list[Speed]:
    """Time each pipeline ``repeats`` times alone and in batches, taking turns.

    Args:
        repeats: calls of each kind for each pipeline; the 95th percentile of fewer than 20 is their maximum.
        warmup: calls of each kind before the first timed one.
    Raises:
        WadiError: if there is nothing to measure.
    """
    if not pipelines or repeats < 1 or batch < 1:
        raise WadiError(
            f"There are {len(pipelines)} pipelines, {repeats} repeats and a batch of {batch}. Each must be at least 1."
        )
    device = torch.device(device)
    evaluations, memory = {}, {}
    for name, pipeline in pipelines.items():
        for _ in range(warmup):
            pipeline.call(batch)
        with count_passes(pipeline.network) as count:
            pipeline.call(1)
        evaluations[name] = float(count.rows)
        memory[name] = _peak_memory(pipeline, batch, device)
    single: dict[str, list[float]] = {name: [] for name in pipelines}
    batched: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(repeats):
        for name, pipeline in pipelines.items():
            single[name].append(_seconds(pipeline, 1, device))
            batched[name].append(_seconds(pipeline, batch, device))
    return [
        Speed(
            name,
            batch / statistics.median(batched[name]),
            1000 * percentile(single[name], 0.5),
            1000 * percentile(single[name], 0.95),
            memory[name],
            parameter_count((pipeline.network, *pipeline.modules)),
            evaluations[name],
            repeats,
            batch,
        )
        for name, pipeline in pipelines.items()
    ]


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Return the number of parameters, with shared ones counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


@dataclass
class PassCount:
    """Calls of a network, and rows (first dimension of its first tensor) that went through it."""

    calls: int = 0
    rows: int = 0


@contextmanager
def count_passes(network: nn.Module) -> Iterator[PassCount]:
    """Count what goes through ``network`` inside the block."""
    count = PassCount()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
        count.calls += 1
        count.rows += len(first)

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def _seconds(pipeline: TimedPipeline, count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    pipeline.call(count)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(pipeline: TimedPipeline, batch: int, device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        pipeline.call(batch)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restart the kernel's peak of this process
        pipeline.call(batch)
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
