"""Hybrids of student and teacher: the student with the teacher's norms, or directions, put back.

If the student draws as before with the teacher's norms and no longer draws with its directions, then what it learned is in the
directions. Only weights of layers are exchanged (matrices and kernels); biases and norms stay the student's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from wadi.analysis.analyze import common_layers
from wadi.analysis.change import exchanged
from wadi.analysis.sources import Live
from wadi.backbones.weights import LazyTensors
from wadi.errors import WadiError
from wadi.roles import matched

TAKES = ("norm", "direction")


def matching(layers: str) -> Callable[[str], bool]:
    """Which layers a regular expression means: it matches their whole names, as ``target_modules`` does.

    Raises:
        WadiError: if it is not a regular expression; on use, if it takes too long (see `wadi.roles.matched`).
    """
    matched(layers, (), "--layers")
    return lambda name: bool(matched(layers, [name], "--layers"))


@torch.no_grad()
def put_back(student: nn.Module, teacher: LazyTensors, take: str, chosen: Callable[[str], bool]) -> list[str]:
    """Put the teacher's norms or directions back into ``student``, in place; the teacher's weights are read one at a time.

    Args:
        take: 'norm' or 'direction'.
        chosen: which layers, by their names.
    Returns:
        Names of the layers that were changed.
    Raises:
        WadiError: if the two are of different families, nothing is chosen, or ``take`` is neither.
    """
    if take not in TAKES:
        raise WadiError(f"--take is {take!r}. Expected {' or '.join(TAKES)}.")
    own = Live(student)
    names = common_layers(teacher, own, "The teacher", "the student")
    wanted = [name for name in names if chosen(name.removesuffix(".weight"))]
    if not wanted:
        raise WadiError(
            f"None of {len(names)} layers is chosen (first: {names[0].removesuffix('.weight')!r}). Expected a regular "
            "expression that matches whole names of layers: 'up_blocks.*', say."
        )
    for name in wanted:
        own[name].copy_(exchanged(teacher[name], own[name], take))
    return [name.removesuffix(".weight") for name in wanted]
