"""After memory ran out: which settings of the run would fit, by the plan's count of a step's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from wadi.distill.config import DistillConfig
from wadi.distill.plan import plan
from wadi.distill.plan.plan import Architecture
from wadi.errors import WadiError
from wadi.parallel.device import total_memory

USABLE = 0.85  # of the memory: the rest is the context, workspaces and fragments, which the plan does not count
GIB = 2**30


def advice(config: DistillConfig, device: torch.device, processes: int = 1) -> str:
    """Sentences that say what a step of ``config`` needs, what ``device`` has, and settings that would fit.

    The images per step, and with them the result, stay the same. Empty if the plan cannot be made.
    """
    try:
        found, room = plan.architecture_of(config.teacher), total_memory(device)
        line = Line.of(config, found, processes)
        fitting = list(options(config, found, room, processes))
    except (WadiError, OSError, MemoryError, RuntimeError):
        return ""
    needed = line.bytes_at(config.batch, config.gradient_checkpointing)
    text = f"A step needs about {needed / GIB:.1f} GiB by the plan; {device} has {room / GIB:.1f} GiB in all."
    if fitting:
        return f"{text} Less is needed with {'; or with '.join(fitting)}."
    return f"{text} Nothing with as many images per step fits: choose a lower --resolution or rank, or --dtype bfloat16."


@dataclass(frozen=True)
class Line:
    """Bytes of a step at batch 1 and at ``batch``, by whether there is gradient checkpointing.

    A step needs the most of several moments, each linear in the batch; between two batches the line is at or above it.
    """

    batch: int
    one: dict[bool, int]
    last: dict[bool, int]

    @classmethod
    def of(cls, config: DistillConfig, found: Architecture, processes: int = 1) -> Line:
        """Plan batch 1 and that of ``config``; a plan of a large model takes some ten seconds."""
        last = max(2, config.batch)
        plans = [plan.plan(replace(config, batch=batch), found, processes) for batch in (1, last)]
        return cls(last, *({on: p.memory["checkpointed" if on else "plain"].total for on in (False, True)} for p in plans))

    def bytes_at(self, batch: int, checkpointing: bool) -> int:
        """Bytes of a step, text encoders and autoencoder included."""
        one, last = self.one[checkpointing], self.last[checkpointing]
        return one + (batch - 1) * (last - one) // (self.batch - 1)


def options(config: DistillConfig, found: Architecture, room: int, processes: int = 1) -> Iterator[str]:
    """Command-line options that make a step fit into ``room`` bytes, with the GiB it then needs.

    First those with which the run can be continued: a lower batch, gradient checkpointing. ``recompute`` if they do not do.
    """
    images, offers = config.batch * config.accumulate, 0
    for recompute in (False, True):
        if recompute < config.recompute or (recompute and offers):
            continue
        line = Line.of(replace(config, recompute=recompute), found, processes)
        for checkpointing in (False, True):
            words = " --gradient_checkpointing true" * (checkpointing > config.gradient_checkpointing)
            words += " --recompute true" * (recompute > config.recompute)
            fit = [n for n in _divisors(images) if n <= config.batch and line.bytes_at(n, checkpointing) <= USABLE * room]
            if checkpointing < config.gradient_checkpointing or not fit or (fit[0], words) == (config.batch, ""):
                continue
            share = f"--batch {fit[0]} --accumulate {images // fit[0]}" if fit[0] < config.batch else ""
            offers += 1
            yield f"{share}{words} (about {line.bytes_at(fit[0], checkpointing) / GIB:.1f} GiB)".strip()


def _divisors(number: int) -> list[int]:
    """Descending."""
    return [candidate for candidate in range(number, 0, -1) if number % candidate == 0]
