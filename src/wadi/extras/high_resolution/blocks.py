"""Which convolutions of a U-Net are re-dilated, and by which factor each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from wadi.errors import WadiError

Factor = float | tuple[float, float]  # of both axes, or (down, across)
Blocks = str | Sequence[str] | Mapping[str, Factor] | None

ALL = ("down_blocks", "mid_block", "up_blocks")


def convolutions_of(
    network: nn.Module, factor: Factor, blocks: Blocks = None
) -> dict[str, tuple[nn.Conv2d, tuple[float, float]]]:
    """Return the chosen convolutions by name, each with its factor ``(down, across)``.

    Args and Raises: as `wadi.extras.high_resolution.redilation.redilated`.
    """
    convolutions = {name: module for name, module in network.named_modules() if _is_spatial(name, module)}
    if not convolutions:
        raise WadiError(
            f"{type(network).__name__} has no convolutions to re-dilate. Give a diffusers U-Net. A transformer generates at "
            "other sizes without a change, or with interpolated positions."
        )
    factors = _factors_by_prefix(network, factor, blocks)
    for prefix in factors:
        if not any(_is_under(name, prefix) for name in convolutions):
            known = sorted({".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in convolutions})
            raise WadiError(f"Block {prefix!r} has no convolution. Choose 'all' or some of {', '.join(known)}.")
    chosen = {}
    for name, conv in convolutions.items():
        fitting = [prefix for prefix in factors if _is_under(name, prefix)]
        if fitting:
            _check_layer(network, name, conv)
            chosen[name] = conv, factors[max(fitting, key=len)]
    return chosen


def _is_spatial(name: str, module: nn.Module) -> bool:
    """Return whether a module is a convolution of a block with a kernel larger than one pixel."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and name.startswith(ALL)


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _check_layer(network: nn.Module, name: str, conv: nn.Conv2d) -> None:
    """Raise `WadiError` if the layer has something that re-dilation would ignore."""
    from wadi.lorad.layer import LoRaDLayer

    # A LoRaD layer uses the weight of its base layer and does not call its forward; a LoRA layer calls it.
    if isinstance(network.get_submodule(name.rpartition(".")[0]), LoRaDLayer):
        raise WadiError(f"Layer {name} has a LoRaD adapter, which re-dilation would ignore. Merge it first.")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or any(k % 2 == 0 for k in conv.kernel_size):
        raise WadiError(
            f"Layer {name} is {conv}. Only odd kernels with zeros as padding can be re-dilated: leave its block out, by naming "
            "the other blocks."
        )


def _factors_by_prefix(network: nn.Module, factor: Factor, blocks: Blocks) -> dict[str, tuple[float, float]]:
    if isinstance(blocks, Mapping):
        return {prefix: factor_pair(own) for prefix, own in blocks.items()}
    if blocks is None:
        names: Sequence[str] = lowest_resolution_blocks(network)
    else:
        names = ALL if blocks == "all" else [blocks] if isinstance(blocks, str) else blocks
    children = {name for name, _ in network.named_children()}
    return {name: factor_pair(factor) for name in names if blocks != "all" or name in children}


def factor_pair(factor: Factor) -> tuple[float, float]:
    """Return ``(down, across)`` of a factor.

    Raises:
        WadiError: if it is below 1 or not a number.
    """
    both = factor if isinstance(factor, tuple) else (factor, factor)
    if len(both) != 2 or not all(math.isfinite(d) and d >= 1 for d in both):
        raise WadiError(f"The factor of re-dilation is {factor}. Give at least 1, for both axes or (down, across).")
    return round(float(both[0]), 6), round(float(both[1]), 6)


def blocks_in(network: nn.Module, blocks: str | Sequence[str] | Mapping[str, Factor]) -> list[str] | dict[str, Factor]:
    """Return ``blocks`` without those that ``network`` lacks: a ControlNet has no ``up_blocks``."""
    children = {name for name, _ in network.named_children()}
    if isinstance(blocks, Mapping):
        return {name: factor for name, factor in blocks.items() if name.split(".")[0] in children}
    return [name for name in ([blocks] if isinstance(blocks, str) else blocks) if name.split(".")[0] in children]


def lowest_resolution_blocks(network: nn.Module) -> list[str]:
    """Return the names of the last down block, the middle block and the first up block of a U-Net (or ControlNet)."""
    downs = getattr(network, "down_blocks", [])
    names = [f"down_blocks.{len(downs) - 1}"] if len(downs) else []
    names += ["mid_block"] if getattr(network, "mid_block", None) is not None else []
    return names + (["up_blocks.0"] if len(getattr(network, "up_blocks", [])) else [])
