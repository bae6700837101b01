"""The released scripts' layout, written anew from its description, as the baseline of the benchmarks.

Three copies of the network (teacher, student, fake model). Rotation by a forward *hook*: the frozen layer's product is
computed, thrown away and computed again with the rotated weight; autograd keeps angle, sine and cosine; the angle is
wrapped by a modulo; conditional and null passes run one after the other.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HookedRotation(nn.Module):
    """Angles of one Linear, applied by a forward hook on top of the layer's own product."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        out, fan_in = layer.weight.shape
        self.A = nn.Parameter(torch.zeros(out, rank, device=layer.weight.device))
        self.B = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, fan_in // 2, device=layer.weight.device)))
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        theta = self.A @ self.B
        theta = (theta + math.pi) % (2 * math.pi) - math.pi
        cos, sin = theta.cos(), theta.sin()
        even, odd = layer.weight[:, 0::2].float(), layer.weight[:, 1::2].float()
        rotated = torch.empty_like(layer.weight)
        rotated[:, 0::2] = even * cos - odd * sin
        rotated[:, 1::2] = even * sin + odd * cos
        return F.linear(inputs[0], rotated, layer.bias)


def hook(network: nn.Module, targets: str, rank: int) -> list[nn.Parameter]:
    """Freeze ``network`` and hook every Linear that ``targets`` fully matches; returns the angles."""
    network.requires_grad_(False)
    angles: list[nn.Parameter] = []
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and re.fullmatch(targets, name):
            rotation = HookedRotation(layer, rank)
            angles += [rotation.A, rotation.B]
    return angles


def guided_separately(predict: Any, x_t: Tensor, t: Tensor, condition: Any, null: Any, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in two passes, one after the other."""
    unconditional = predict(x_t, t, null)
    return unconditional + guidance_scale * (predict(x_t, t, condition) - unconditional)
