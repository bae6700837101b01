"""The device to run on, its memory, and settings that make a CPU faster."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from wadi.errors import WadiError, first_line
from wadi.io.regular import read_text


def find_device(name: str | None) -> torch.device:
    """Return the device called ``name``.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...; None = the best of this machine: an NVIDIA or AMD GPU, an Apple
            GPU, or the CPU.
    Raises:
        WadiError: if the machine has no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WadiError(f"Device {name!r} cannot be used: {first_line(error)}. Expected cpu, cuda, cuda:1, mps, ...") from error
    return device


DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(name: str, allowed: Sequence[str] = DTYPES) -> torch.dtype:
    """Return the floating-point type of that name.

    Raises:
        WadiError: if the name is not one of ``allowed``.
    """
    if name not in allowed:
        raise WadiError(f"--dtype is {name!r}. Use {', '.join(allowed[:-1])} or {allowed[-1]}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def computes_with_bfloat16(device: torch.device) -> bool | None:
    """Return whether a device has instructions for bfloat16; None if torch does not say.

    A CPU without them emulates bfloat16, fifty times as slow as float32.
    """
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else None
    return bool(torch.cuda.is_bf16_supported()) if device.type == "cuda" else None


# --- memory -----------------------------------------------------------------------------------------------------------------


def refuse_larger(size: int, device: torch.device, what: str, remedy: str) -> None:
    """Raise `WadiError` if ``size`` bytes exceed all the memory of ``device``. Call it before they are allocated.

    Args:
        what: starts the message, such as ``"A batch of 8 images"``.
        remedy: ends the message with what to do.
    """
    total = memory_of(device)
    if total is not None and size > total:
        has = f"{device.type} has {total / 2**30:,.1f} GiB"
        raise WadiError(f"{what} would need {size:,} bytes ({size / 2**30:,.1f} GiB), and {has}. {remedy}")


def memory_of(device: torch.device) -> int | None:
    """Return all memory of ``device`` in bytes; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system without sysconf
        return None


_FULL = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "defaultcpuallocator",
    "cublas_status_alloc_failed",
)  # fmt: skip


class OutOfMemory(WadiError):
    """Memory ran out on ``device``."""

    def __init__(self, message: str, device: torch.device) -> None:
        super().__init__(message)
        self.device = device


def out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory ran out, on the CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _FULL)


@contextmanager
def explained_when_full(device: torch.device, doing: Callable[[], str], advice: str) -> Iterator[None]:
    """Turn every error about full memory within the block into `OutOfMemory`.

    Args:
        doing: called in that case; returns the work that was running, such as ``step 3 of 100``.
        advice: what to do, in sentences.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WadiError) or not out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
        raise OutOfMemory(f"Memory on {device} ran out ({doing()}): {reason}. {advice}", device) from error


def total_memory(device: torch.device) -> int:
    """Return the memory of ``device`` in bytes; for the CPU the part that this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(WadiError, ValueError):
            limits.append(int(read_text(Path("/sys/fs/cgroup", limit))))
    with suppress(ImportError, OSError):
        import resource

        limits += [bytes_ for bytes_ in resource.getrlimit(resource.RLIMIT_AS) if bytes_ != resource.RLIM_INFINITY]
    return min(limits)


# --- the CPU ----------------------------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from malloc.h


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    import psutil

    return int(psutil.virtual_memory().available)


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that torch frees. Call it once per process.

    A training loop needs the same blocks at every step. By default glibc returns each large block to the system, which then
    provides and zeroes its pages again. On small virtual machines that can take longer than the arithmetic.

    Returns:
        False if the system has no ``mallopt``.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    done = [mallopt(option, value) == 1 for option, value in options]  # a list, so that each is set
    return all(done)
