"""Images with prompts for objectives that need some: the teacher's samples from the warm-start pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from wadi.backbones import Condition
from wadi.distill.conditions import Conditions
from wadi.distill.warm_start import Pairs


@dataclass(frozen=True)
class Samples:
    """Samples as latents.

    Attributes:
        x0: ``(M, C, H, W)``, float32, on the CPU.
        conditions: function from row numbers to the condition of their prompts, on the network's device.
    """

    x0: Tensor
    conditions: Callable[[Tensor], Condition]


def samples_of_pairs(pairs: Pairs, conditions: Conditions) -> Samples:
    """Return the teacher's samples among the warm-start pairs."""
    return Samples(pairs.x0, lambda rows: conditions(pairs.rows[rows]))
