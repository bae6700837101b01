"""The machine that a benchmark ran on."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version
from pathlib import Path

import torch

from wadi.io.wording import counted


def machine(device: str = "cpu") -> str:
    """Return one line: processor or GPU, threads, and the versions of the libraries."""
    if device.startswith("cuda"):
        place = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        place = f"{names[0] if names else platform.processor()}, {counted(torch.get_num_threads(), 'thread')}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "diffusers"))
    return f"{place}; Python {platform.python_version()}, {packages}"


def peak_rss_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
