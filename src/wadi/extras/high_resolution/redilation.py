"""Re-dilation: convolutions that see further, for pictures larger than those a U-Net was trained on (arXiv 2310.07702).

A convolution that was trained on 64 x 64 features sees, on 128 x 128, half as much of the picture: things come out small and
several times. Re-dilation enlarges what each chosen convolution sees by a factor ``d``, whole or fractional:

    f_d(h) = interp_{1/s}( f_{k, ceil d}( interp_s(h) ) ),   s = ceil(d) / d,   f_{k, n}: kernel k with dilation n

so for a whole ``d`` it is the plain dilated convolution. ``d`` may differ by axis and by block. With ``disperse`` a factor of
two of ``d`` comes from dispersed kernels (`dispersion`) and dilation does the rest. The paper's third part,
noise-damped guidance, concerns guidance in many steps; a one-step student has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.extras.high_resolution import dispersion
from wadi.extras.high_resolution.dispersion import SCALE

Factor = float | tuple[float, float]  # of both axes, or (down, across)
Blocks = str | Sequence[str] | Mapping[str, Factor] | None

ALL = ("down_blocks", "mid_block", "up_blocks")


def redilated_conv(x: Tensor, conv: nn.Conv2d, factor: tuple[float, float], weight: Tensor | None = None) -> Tensor:
    """``conv(x)`` with its field enlarged ``factor``-fold down and across; shapes are those of ``conv(x)``.

    Args:
        weight: in place of the convolution's own, with a kernel of any odd size.
    """
    W = conv.weight if weight is None else weight
    whole = [math.ceil(d) for d in factor]
    dilation = [old * n for old, n in zip(conv.dilation, whole, strict=True)]
    # The picture keeps its size: half of what the field grows by is added on every side.
    grown = [
        n * (k - 1) - old * (k0 - 1)
        for n, k, old, k0 in zip(dilation, W.shape[2:], conv.dilation, conv.kernel_size, strict=True)
    ]
    padding = [p + extra // 2 for p, extra in zip(_padding(conv), grown, strict=True)]
    size = [round(side * n / d) for side, n, d in zip(x.shape[2:], whole, factor, strict=True)]
    if size == list(x.shape[2:]):
        return F.conv2d(x, W, conv.bias, conv.stride, padding, dilation, conv.groups)
    x_s = F.interpolate(x, size=size, mode="bilinear")
    return F.interpolate(
        F.conv2d(x_s, W, conv.bias, conv.stride, padding, dilation, conv.groups), size=_out(x, conv), mode="bilinear"
    )


def _out(x: Tensor, conv: nn.Conv2d) -> list[int]:
    """``(height, width)`` of ``conv(x)``."""
    sides = zip(x.shape[2:], _padding(conv), conv.dilation, conv.kernel_size, conv.stride, strict=True)
    return [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, p, d, k, s in sides]


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """In numbers: what is padded by a word (``"same"``) is refused before."""
    padding: Any = conv.padding
    return int(padding[0]), int(padding[1])


@contextmanager
def redilated(network: nn.Module, factor: Factor, blocks: Blocks = None, disperse: bool = False) -> Iterator[list[str]]:
    """Within the block the convolutions of a U-Net (or its ControlNet) see ``factor`` times as far; then all is as before.

    Weights stay as they are, adapters (LoRA) included; yields the names of the layers concerned. ``factor`` 1 changes nothing.

    Args:
        factor: at least 1, for both axes or ``(down, across)``.
        blocks: None = those at the lowest resolution, as ScaleCrafter does for 512 to 1024; ``"all"``; prefixes of names, as
            ``["mid_block", "up_blocks.0"]``; or prefixes with factors of their own, ``{"mid_block": 2, "up_blocks.0": 1.5}``,
            the longest that fits counting.
        disperse: let dispersed 5 x 5 kernels in place of 3 x 3 make for a factor of two.
    Raises:
        WadiError: if there is nothing to re-dilate, a factor is out of range, a block does not exist, or layers carry what
            would be passed over (an unmerged LoRaD adapter, a replaced forward).
    """
    with ExitStack() as stack:
        chosen = _choose(network, factor, blocks)
        replaced = {name: _replacement(conv, d, disperse) for name, (conv, d) in chosen.items() if disperse or d != (1, 1)}
        for name, forward in replaced.items():
            stack.enter_context(answering(name, chosen[name][0], forward))
        yield list(replaced)


def _replacement(conv: nn.Conv2d, factor: tuple[float, float], dispersed: bool) -> Callable[[Tensor], Tensor]:
    if not dispersed:
        return lambda x: redilated_conv(x, conv, factor)
    if min(factor) < SCALE:
        raise WadiError(f"Dispersion doubles what a layer sees, and the factor is {factor}. Expected at least {SCALE}.")
    k = conv.kernel_size[0]
    rest = (factor[0] / SCALE, factor[1] / SCALE)
    with torch.no_grad():
        W = dispersion.disperse(conv.weight, dispersion.dispersion(k, 2 * k - 1))
    return lambda x: redilated_conv(x, conv, rest, W)


@contextmanager
def answering(name: str, module: Any, forward: Callable[..., Any], method: str = "forward") -> Iterator[None]:
    """Within the block ``module`` answers by ``forward``, an attribute of the object that hides its class's."""
    if method in vars(module):
        raise WadiError(
            f"Layer {name} is replaced already (re-dilated, or offloaded layer by layer). Expected a model as it was loaded: "
            "leave the other context first, or offload whole models."
        )
    setattr(module, method, forward)
    try:
        yield
    finally:
        delattr(module, method)


def _choose(network: nn.Module, factor: Factor, blocks: Blocks) -> dict[str, tuple[nn.Conv2d, tuple[float, float]]]:
    """Convolutions by name, each with its factor ``(down, across)``."""
    found = {name: module for name, module in network.named_modules() if _is_ours(name, module)}
    if not found:
        raise WadiError(
            f"{type(network).__name__} has no convolutions to re-dilate. Expected a diffusers U-Net; a transformer draws at "
            "other sizes as it is, or with its positions interpolated."
        )
    factors = _prefixes(network, factor, blocks)
    for prefix in factors:
        if not any(_under(name, prefix) for name in found):
            known = sorted({".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in found})
            raise WadiError(f"No convolution lies under block {prefix!r}. Expected 'all' or some of {', '.join(known)}.")
    chosen = {}
    for name, conv in found.items():
        fitting = [prefix for prefix in factors if _under(name, prefix)]
        if fitting:
            _refuse_passed_over(network, name, conv)
            chosen[name] = conv, factors[max(fitting, key=len)]
    return chosen


def _is_ours(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and name.startswith(ALL)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _refuse_passed_over(network: nn.Module, name: str, conv: nn.Conv2d) -> None:
    parent = network.get_submodule(name.rpartition(".")[0])
    if name.endswith(".base_layer") and hasattr(parent, "lorad_A"):
        raise WadiError(f"Layer {name} carries a LoRaD adapter, which would be passed over. Expected it merged: fuse it first.")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or any(k % 2 == 0 for k in conv.kernel_size):
        raise WadiError(
            f"Layer {name} is {conv}. Expected odd kernels and zeros as padding: leave its block out, by naming the others."
        )


def _prefixes(network: nn.Module, factor: Factor, blocks: Blocks) -> dict[str, tuple[float, float]]:
    if isinstance(blocks, Mapping):
        return {prefix: pair(own) for prefix, own in blocks.items()}
    names = deepest(network) if blocks is None else ALL if blocks == "all" else [blocks] if isinstance(blocks, str) else blocks
    tops = {name for name, _ in network.named_children()}
    return {name: pair(factor) for name in names if blocks != "all" or name in tops}


def pair(factor: Factor) -> tuple[float, float]:
    """``(down, across)`` of a factor.

    Raises:
        WadiError: if it is below 1 or no number.
    """
    both = factor if isinstance(factor, tuple) else (factor, factor)
    if len(both) != 2 or not all(math.isfinite(d) and d >= 1 for d in both):
        raise WadiError(f"The factor of re-dilation is {factor}. Expected at least 1, for both axes or (down, across).")
    return round(float(both[0]), 6), round(float(both[1]), 6)


def present(network: nn.Module, blocks: str | Sequence[str] | Mapping[str, Factor]) -> list[str] | dict[str, Factor]:
    """``blocks`` without those that ``network`` lacks, as a ControlNet lacks a U-Net's way up."""
    tops = {name for name, _ in network.named_children()}
    if isinstance(blocks, Mapping):
        return {name: factor for name, factor in blocks.items() if name.split(".")[0] in tops}
    return [name for name in ([blocks] if isinstance(blocks, str) else blocks) if name.split(".")[0] in tops]


def deepest(network: nn.Module) -> list[str]:
    """Blocks of a U-Net (or a ControlNet) at its lowest resolution: the last one down, the middle, the first one up."""
    downs = getattr(network, "down_blocks", [])
    named = [f"down_blocks.{len(downs) - 1}"] if len(downs) else []
    named += ["mid_block"] if getattr(network, "mid_block", None) is not None else []
    return named + (["up_blocks.0"] if len(getattr(network, "up_blocks", [])) else [])


def growth(native: tuple[int, int], wanted: tuple[int, int]) -> float:
    """The factor for a U-Net asked for ``wanted``: that of the axis that grows less, and at least 1."""
    return max(1.0, min(w / n for w, n in zip(wanted, native, strict=True)))
