"""The layout of the authors' released scripts, rewritten from its description, as the baseline of the benchmarks.

It has three copies of the network (teacher, student, fake model). A forward *hook* rotates: the frozen layer's product is
computed, discarded, and computed again with the rotated weight. Autograd keeps angle, sine and cosine, and the angle is
wrapped by a modulo. The conditional and the null pass run one after the other.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HookedRotation(nn.Module):
    """The angles of one Linear, applied by a forward hook after the layer's own product."""

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
    """Freeze ``network``, hook every Linear whose whole name ``targets`` matches, and return the angles."""
    network.requires_grad_(False)
    angles: list[nn.Parameter] = []
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and re.fullmatch(targets, name):
            rotation = HookedRotation(layer, rank)
            angles += [rotation.A, rotation.B]
    return angles


def guided_separately(predict: Any, x_t: Tensor, t: Tensor, condition: Any, null: Any, guidance_scale: float) -> Tensor:
    """Return classifier-free guidance from two passes, one after the other."""
    unconditional = predict(x_t, t, null)
    return unconditional + guidance_scale * (predict(x_t, t, condition) - unconditional)
