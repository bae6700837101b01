"""The processes that share one run: how they agree, and which of them writes files.

Every process holds the same adapters, optimisers and random generator. Each draws the random numbers of a whole step and uses
its own rows. After the backward pass the gradients of the adapters, which are small, are averaged in one message. Nothing is
wrapped, and no frozen weight travels, so the result does not depend on the number of processes, up to rounding.

Methods of `Ranks` that communicate say so. All processes must call them at the same place.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wadi.errors import WadiError, first_line

WAITING_TIME = datetime.timedelta(hours=2)  # for which a process waits while the first one writes


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; without arguments, this process alone.

    Attributes:
        count: number of processes.
        index: number of this process; 0 is the first, which alone writes files.
    """

    count: int = 1
    index: int = 0

    @classmethod
    def of_process_group(cls) -> Ranks:
        """Return the processes that accelerate or torchrun set up; this one alone if there is no process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_world_size(), dist.get_rank())

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's equal share of the ``rows`` of a step."""
        share = len(rows) // self.count
        return rows[self.index * share : (self.index + 1) * share]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors`` by their mean over all processes, in one message. Communicates.

        Raises:
            WadiError: if another process ended.
        """
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        with _lost_process_explained():
            dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def largest(self, number: int) -> int:
        """Return the largest ``number`` of all processes, on each of them. Communicates.

        Raises:
            WadiError: if another process ended.
        """
        if self.count == 1:
            return number
        value = torch.tensor([number], device=_message_device())
        with _lost_process_explained():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def wait_for_all(self) -> None:
        """Return once every process has called this. Communicates.

        Raises:
            WadiError: if another process ended.
        """
        self.largest(0)

    def on_first(self, act: Callable[[], int | None]) -> int:
        """Run ``act`` on the first process while the others wait, and return its result on all of them. Communicates.

        Args:
            act: returns a number of 0 or more, or None, which counts as 0.
        Raises:
            Exception: on the first process, whatever ``act`` raised.
            WadiError: on the other processes, if ``act`` raised something.
        """
        failure: Exception | None = None
        number = -1
        if self.index == 0:
            try:
                number = int(act() or 0)
            except Exception as error:  # the others wait for a number, whatever happened
                failure = error
        number = self.largest(number)
        if failure is not None:
            raise failure
        if number < 0:
            raise WadiError("The first process of this run stopped with an error: see its message.")
        return number


@contextmanager
def _lost_process_explained() -> Iterator[None]:
    """Turn the backend's error about a lost process into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise WadiError(
            f"Another process of this run ended: {first_line(error)}. The last checkpoint is untouched. The same "
            "command continues from it."
        ) from error


def _message_device() -> torch.device:
    """Return the device on which the backend in use expects the tensors that it sends."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def make_accelerator(device: torch.device, tracker: str | None, folder: Path) -> Any:
    """Return accelerate's accelerator. It sets up the processes that ``accelerate launch`` started, and reports to ``tracker``.

    Raises:
        WadiError: if accelerate does not know the tracker, or it is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            log_with=tracker,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAITING_TIME)],
        )
    except ValueError as error:
        raise WadiError(f"tracker is {tracker!r}, which accelerate does not know: {error}") from error
    if tracker and not accelerator.log_with:
        raise WadiError(f"tracker is {tracker!r}, which is not installed. Install it, or set tracker to null.")
    return accelerator


def shard_frozen(network: nn.Module, trainable: Iterable[nn.Parameter]) -> None:
    """Spread the frozen weights over all processes (FSDP2), block by block. ``trainable`` parameters stay whole on each.

    Raises:
        WadiError: if there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise WadiError("shard is true, but there is only one process. Start several with `accelerate launch`.")
    mesh = init_device_mesh(_message_device().type, (dist.get_world_size(),))
    unsharded = set(trainable)
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for block in (*(block for blocks in lists for block in blocks), network):
        fully_shard(block, mesh=mesh, ignored_params=unsharded)
