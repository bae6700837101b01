"""Several processes, one run: what they agree on, and who writes.

Every process holds the same angles, optimisers and random generator, draws the whole step's numbers and takes its own rows of
them. After the backward pass the gradients of the angles, which are small, are averaged in one message; nothing is wrapped and
nothing frozen travels. So a run does not depend on how many processes share it, to rounding.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wadi.errors import WadiError, first_line

PATIENCE = datetime.timedelta(hours=2)  # a process may wait that long while the first one writes


class Ranks:
    """The processes of a run, as accelerate set them up; one process if it did not.

    Attributes:
        count: how many there are.
        index: which of them this is; 0 is the first, which alone writes files.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.index = dist.get_rank() if together else 0

    def own(self, rows: Tensor) -> Tensor:
        """This process's equal share of the ``rows`` of a step."""
        share = len(rows) // self.count
        return rows[self.index * share : (self.index + 1) * share]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Every process's mean in place of its own ``tensors``, in one message.

        Raises:
            WadiError: if another process ended.
        """
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        with _met():
            dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def largest(self, number: int) -> int:
        """The largest of every process's ``number``, on each of them."""
        if self.count == 1:
            return number
        value = torch.tensor([number], device=_device())
        with _met():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def first(self, act: Callable[[], int | None]) -> int:
        """``act()`` on the first process while the others wait; its number (0 for None) is given to all.

        Raises:
            Exception: on the first process what ``act`` raised.
            WadiError: on the others, if it raised something.
        """
        failed: Exception | None = None
        number = 0
        if self.index == 0:
            try:
                number = int(act() or 0)
            except Exception as error:  # whatever it is, the others wait for a number
                failed, number = error, -1
        number = self.largest(number if self.index == 0 else -1)  # numbers are 0 or more
        if failed is not None:
            raise failed
        if number < 0:
            raise WadiError("The first process stopped on an error. Expected it to go on: see its message.")
        return number


@contextmanager
def _met() -> Iterator[None]:
    """Turn the backend's complaint about a lost process into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise WadiError(
            f"Another process of this run ended: {first_line(error)}. Expected all of them to go on. The last "
            "checkpoint is untouched, and the same command continues from it."
        ) from error


def _device() -> torch.device:
    """Where messages of the backend in use have to lie."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def make_accelerator(device: torch.device, tracker: str | None, folder: Path) -> Any:
    """Accelerate's accelerator: it sets up the processes that ``accelerate launch`` started, and reports to ``tracker``.

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
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise WadiError(f"tracker is {tracker!r}. Expected one that accelerate knows: {error}") from error
    if tracker and not accelerator.log_with:
        raise WadiError(f"tracker is {tracker!r}, which is not installed. Expected it, or null: install {tracker}.")
    return accelerator


def shard_frozen(network: nn.Module, angles: Iterable[nn.Parameter]) -> None:
    """Spread the frozen weights over all processes (FSDP2), block by block; the ``angles`` stay whole on each.

    Raises:
        WadiError: if there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise WadiError("shard is true, and there is one process. Expected several: start with `accelerate launch`.")
    mesh = init_device_mesh(_device().type, (dist.get_world_size(),))
    whole = set(angles)
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for block in (*(block for blocks in lists for block in blocks), network):
        fully_shard(block, mesh=mesh, ignored_params=whole)
