"""Re-dilation: convolutions that cover a larger area, for images larger than a U-Net was trained on (arXiv 2310.07702).

A convolution that was trained on 64 x 64 features covers half as much of the image on 128 x 128 features. So objects come out
small and several times. Re-dilation enlarges the area that each chosen convolution covers by a factor ``d``, whole or
fractional:

    f_d(h) = interp_{1/s}( f_{k, ceil d}( interp_s(h) ) ),   s = ceil(d) / d,   f_{k, n}: kernel k with dilation n

For a whole ``d`` this is the plain dilated convolution. ``d`` may differ by axis and by block. With ``disperse``, dispersed
kernels (`dispersion`) give a factor of two of ``d``, and dilation gives the rest. The paper's third part, noise-damped
guidance, is about guidance in many steps, which a one-step student does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.extras.high_resolution.blocks import Blocks, Factor, convolutions_of
from wadi.extras.high_resolution.dispersion import SCALE, disperse, dispersion_matrix
from wadi.extras.high_resolution.replace import replaced_method


def redilated_conv(x: Tensor, conv: nn.Conv2d, factor: tuple[float, float], weight: Tensor | None = None) -> Tensor:
    """Return ``conv(x)`` with its field enlarged by ``factor`` (down, across); the shape is that of ``conv(x)``.

    Args:
        weight: used instead of the convolution's own; its kernel may have any odd size.
    """
    W = conv.weight if weight is None else weight
    whole = [math.ceil(d) for d in factor]
    dilation = [old * n for old, n in zip(conv.dilation, whole, strict=True)]
    # Half of the field's growth is added as padding on every side, so the output keeps its size.
    growth = [
        n * (k - 1) - old * (k0 - 1)
        for n, k, old, k0 in zip(dilation, W.shape[2:], conv.dilation, conv.kernel_size, strict=True)
    ]
    padding = [p + extra // 2 for p, extra in zip(_padding(conv), growth, strict=True)]
    size = [round(side * n / d) for side, n, d in zip(x.shape[2:], whole, factor, strict=True)]
    if size == list(x.shape[2:]):
        return F.conv2d(x, W, conv.bias, conv.stride, padding, dilation, conv.groups)
    x_s = F.interpolate(x, size=size, mode="bilinear")
    return F.interpolate(
        F.conv2d(x_s, W, conv.bias, conv.stride, padding, dilation, conv.groups), size=_output_size(x, conv), mode="bilinear"
    )


def _output_size(x: Tensor, conv: nn.Conv2d) -> list[int]:
    """Return ``(height, width)`` of ``conv(x)``."""
    sides = zip(x.shape[2:], _padding(conv), conv.dilation, conv.kernel_size, conv.stride, strict=True)
    return [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, p, d, k, s in sides]


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the padding in pixels. `convolutions_of` has excluded padding by a word (``"same"``)."""
    padding: Any = conv.padding
    return int(padding[0]), int(padding[1])


@contextmanager
def redilated(network: nn.Module, factor: Factor, blocks: Blocks = None, disperse: bool = False) -> Iterator[list[str]]:
    """Enlarge the field of the convolutions of a U-Net (or its ControlNet) by ``factor`` within the block.

    Yields the names of the changed layers. Weights are not changed, and LoRA adapters stay active. A factor of 1 changes
    nothing.

    Args:
        factor: at least 1, for both axes or ``(down, across)``.
        blocks: which blocks to change.
            None = those at the lowest resolution, as ScaleCrafter does for 512 to 1024.
            ``"all"``.
            Prefixes of names, such as ``["mid_block", "up_blocks.0"]``.
            Prefixes with their own factors, ``{"mid_block": 2, "up_blocks.0": 1.5}``; the longest prefix that fits counts.
        disperse: replace 3 x 3 kernels by dispersed 5 x 5 kernels, which give a factor of two.
    Raises:
        WadiError: if there is nothing to re-dilate, a factor is out of range, a block does not exist, or a layer has something
            that re-dilation would ignore (an unmerged LoRaD adapter, a replaced forward).
    """
    with ExitStack() as stack:
        chosen = convolutions_of(network, factor, blocks)
        forwards = {name: _forward(conv, d, disperse) for name, (conv, d) in chosen.items() if disperse or d != (1, 1)}
        for name, forward in forwards.items():
            stack.enter_context(replaced_method(name, chosen[name][0], forward))
        yield list(forwards)


def _forward(conv: nn.Conv2d, factor: tuple[float, float], dispersed: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that replaces the convolution's forward."""
    if not dispersed:
        return lambda x: redilated_conv(x, conv, factor)
    if min(factor) < SCALE:
        raise WadiError(f"The factor is {factor}. Dispersion doubles the field of a layer: give at least {SCALE}.")
    k = conv.kernel_size[0]
    rest = (factor[0] / SCALE, factor[1] / SCALE)
    with torch.no_grad():
        W = disperse(conv.weight, dispersion_matrix(k, 2 * k - 1))
    return lambda x: redilated_conv(x, conv, rest, W)
