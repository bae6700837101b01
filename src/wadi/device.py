"""Which device to run on, and what a CPU needs to run well."""

from __future__ import annotations

import ctypes
import sys

import torch

from wadi.errors import WadiError


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        WadiError: if the machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WadiError(
            f"Device {name!r} cannot be used: {str(error).splitlines()[0]} Expected cpu, cuda, cuda:1, ..."
        ) from error
    return device


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from malloc.h


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``: of a GPU's memory, else of the machine's."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    import psutil

    return int(psutil.virtual_memory().available)


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that torch frees: a training loop asks for the same blocks again at every step.

    By default glibc gives each large block back to the system, whose pages are faulted in and zeroed anew the next time; on
    small virtual machines that can cost more than the arithmetic. Once per process; False where there is no ``mallopt``.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    done = [mallopt(option, value) == 1 for option, value in wanted]  # each is set, whatever became of the others
    return all(done)
