"""Peak memory of one pipeline's call, however much else lies in the process: its weights, and the most that tensors took.

What a process or a GPU holds in all says little of one of several pipelines in it, and nothing of a CPU whose allocator keeps
what was freed. So tensors are counted: on a GPU by torch's own statistics, on a CPU by the allocations of a profiled call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def peak_mib(call: Callable[[], Any], modules: Iterable[nn.Module], device: str | torch.device = "cpu") -> float:
    """MiB of the modules' parameters and buffers, each counted once, and of the tensors of ``call()`` at their most."""
    kept = {
        tensor.data_ptr(): tensor.nbytes
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if not tensor.is_meta
    }
    own = cuda_peak if torch.device(device).type == "cuda" else cpu_peak
    return (sum(kept.values()) + own(call, torch.device(device))) / 2**20


def cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes above what was allocated before, at the most."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peak(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """The most bytes that allocations during the call held at once. What libraries allocate by themselves is not seen."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = most = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
