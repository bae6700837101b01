"""Which layers of a network have a weight that an adapter can replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_READ_BY_THEIR_PARENT = ("NonDynamicallyQuantizableLinear",)  # out_proj of nn.MultiheadAttention


def why_no_plain_weight(target: nn.Module) -> str:
    """Return why another weight cannot be put in the place of ``target.weight``; empty if it can."""
    plain = nn.Conv2d if isinstance(target, nn.Conv2d) else nn.Linear
    if not isinstance(target, plain):
        return "only Linear and Conv2d have a weight whose rows can be changed"
    # a subclass with its own forward, or attention that reads the layer's weight directly, would not use the new weight
    hidden = type(target).forward is not plain.forward or type(target).__name__ in _READ_BY_THEIR_PARENT
    weight: Any = target.weight
    if hidden or is_parametrized(target) or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return "its weight is hidden by its own forward, a parametrisation or a special format"
    return ""
