"""Peak memory of one pipeline's call: the size of its weights, plus the peak of the tensors that the call allocates.

The memory of the whole process or GPU says little about one of several pipelines in it, and a CPU allocator keeps freed
memory. So tensors are counted instead: by torch's statistics on a GPU, and by the allocations of a profiled call on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def peak_mib(call: Callable[[], Any], modules: Iterable[nn.Module], device: str | torch.device = "cpu") -> float:
    """Return the MiB of the modules' weights, each counted once, plus the peak of the tensors of ``call()``."""
    weights = {
        tensor.data_ptr(): tensor.nbytes
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if not tensor.is_meta
    }
    measure_peak = cuda_peak if torch.device(device).type == "cuda" else cpu_peak
    return (sum(weights.values()) + measure_peak(call, torch.device(device))) / 2**20


def cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of allocated bytes during the call, above those before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peak(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Return the peak of the bytes that the call allocates through torch.

    Allocations inside other libraries are not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    current = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
