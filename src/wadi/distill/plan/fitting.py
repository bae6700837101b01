"""Settings that fit into the memory of a device, from the plan of a step. For the error message after memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from wadi.distill.config import DistillConfig
from wadi.distill.plan import plan
from wadi.distill.plan.architecture import Architecture, read_architecture
from wadi.errors import WadiError
from wadi.parallel.device import total_memory

USABLE = 0.85  # share of the memory for the step; the CUDA context, workspaces and fragmentation need the rest
GIB = 2**30


def suggest_settings(config: DistillConfig, device: torch.device, processes: int = 1) -> str:
    """Return sentences: the memory that a step of ``config`` needs, the memory of ``device``, and settings that would fit.

    The suggested settings keep the number of images per step, and with it the result. Empty if the plan cannot be computed.
    """
    try:
        architecture, available = read_architecture(config.teacher), total_memory(device)
        estimate = Estimate.of(config, architecture, processes)
        fitting = list(fitting_options(config, architecture, available, processes))
    except (WadiError, OSError, MemoryError, RuntimeError):
        return ""
    needed = estimate.bytes_at(config.batch, config.gradient_checkpointing)
    text = f"A step needs about {needed / GIB:.1f} GiB (see `wadi plan`); {device} has {available / GIB:.1f} GiB in total."
    if fitting:
        return f"{text} These settings need less: {'; or '.join(fitting)}."
    return f"{text} No batch size fits. Choose a lower --resolution or rank, or --dtype bfloat16."


@dataclass(frozen=True)
class Estimate:
    """Bytes of a step at batch 1 and at ``batch``, with gradient checkpointing (True) and without (False).

    The memory of a step is the maximum over several moments, and each grows linearly with the batch. A straight line between
    two batch sizes is therefore never too low.
    """

    batch: int
    smallest: dict[bool, int]
    largest: dict[bool, int]

    @classmethod
    def of(cls, config: DistillConfig, architecture: Architecture, processes: int = 1) -> Estimate:
        """Plan batch 1 and the batch of ``config``. The plan of a large model takes about ten seconds.

        Raises:
            WadiError: if the plan does not know the memory of a step.
        """
        batch = max(2, config.batch)
        plans = [plan.plan_run(replace(config, batch=size), architecture, processes) for size in (1, batch)]
        return cls(batch, *(_totals(planned) for planned in plans))

    def bytes_at(self, batch: int, checkpointing: bool) -> int:
        """Return the bytes of a step, including text encoders and autoencoder."""
        smallest, largest = self.smallest[checkpointing], self.largest[checkpointing]
        return smallest + (batch - 1) * (largest - smallest) // (self.batch - 1)


def _totals(planned: plan.Plan) -> dict[bool, int]:
    """Return the bytes of a step with gradient checkpointing (True) and without (False).

    Raises:
        WadiError: if the plan does not know them.
    """
    totals = {}
    for checkpointing in (False, True):
        total = planned.memory["checkpointed" if checkpointing else "plain"].total
        if total is None:
            raise WadiError(f"The memory of a step is unknown: {planned.unknown}. Find a --batch that fits by trial.")
        totals[checkpointing] = total
    return totals


def fitting_options(config: DistillConfig, architecture: Architecture, available: int, processes: int = 1) -> Iterator[str]:
    """Yield command-line options with which a step fits into ``available`` bytes, and the memory that it then needs.

    A lower batch and gradient checkpointing come first, because a run can be resumed with them. ``recompute`` is suggested
    only if they are not enough.
    """
    images, count = config.batch * config.accumulate, 0
    for recompute in (False, True):
        if recompute < config.recompute or (recompute and count):
            continue
        estimate = Estimate.of(replace(config, recompute=recompute), architecture, processes)
        for checkpointing in (False, True):
            flags = " --gradient-checkpointing true" * (checkpointing > config.gradient_checkpointing)
            flags += " --recompute true" * (recompute > config.recompute)
            fitting = [
                batch
                for batch in _divisors(images)
                if batch <= config.batch and estimate.bytes_at(batch, checkpointing) <= USABLE * available
            ]
            if checkpointing < config.gradient_checkpointing or not fitting or (fitting[0], flags) == (config.batch, ""):
                continue
            batch = fitting[0]
            smaller = f"--batch {batch} --accumulate {images // batch}" if batch < config.batch else ""
            count += 1
            yield f"{smaller}{flags} (about {estimate.bytes_at(batch, checkpointing) / GIB:.1f} GiB)".strip()


def _divisors(number: int) -> list[int]:
    """Return all divisors, the largest first."""
    return [candidate for candidate in range(number, 0, -1) if number % candidate == 0]
