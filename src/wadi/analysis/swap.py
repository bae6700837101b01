"""Hybrids of student and teacher: the student with the teacher's norms, or the teacher's directions, put back.

If the student generates as before with the teacher's norms, and no longer does with its directions, then it learned through
the directions. Only weights of layers (matrices and kernels) are exchanged; biases and norms stay the student's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from wadi.analysis.analyze import common_layers
from wadi.analysis.sources import LoadedNetwork
from wadi.backbones.lazy_tensors import LazyTensors
from wadi.errors import WadiError
from wadi.io.patterns import matching_names
from wadi.roles.change import exchange_rows

TAKES = ("norm", "direction")


def matching(layers: str) -> Callable[[str], bool]:
    """Return a function that says whether a regular expression matches the whole name of a layer, as ``target_modules`` does.

    Raises:
        WadiError: if it is not a regular expression, or later if it takes too long (see `wadi.io.patterns.matching_names`).
    """
    matching_names(layers, (), "--layers")
    return lambda name: bool(matching_names(layers, [name], "--layers"))


@torch.no_grad()
def put_back(student: nn.Module, teacher: LazyTensors, take: str, chosen: Callable[[str], bool]) -> list[str]:
    """Put the teacher's norms or directions back into ``student``, in place. The teacher's weights are read one at a time.

    Args:
        take: 'norm' or 'direction'.
        chosen: which layers, by their names.
    Returns:
        Names of the layers that were changed.
    Raises:
        WadiError: if the two are of different families, no layer is chosen, or ``take`` is neither.
    """
    if take not in TAKES:
        raise WadiError(f"--take is {take!r}. It must be {' or '.join(TAKES)}.")
    weights = LoadedNetwork(student)
    names = common_layers(teacher, weights, "The teacher", "the student")
    exchanged = [name for name in names if chosen(name.removesuffix(".weight"))]
    if not exchanged:
        raise WadiError(
            f"--layers matches none of {len(names)} layers (first: {names[0].removesuffix('.weight')!r}). Give a regular "
            "expression that matches whole names, such as 'up_blocks.*'."
        )
    for name in exchanged:
        weights[name].copy_(exchange_rows(teacher[name], weights[name], take))
    return [name.removesuffix(".weight") for name in exchanged]
