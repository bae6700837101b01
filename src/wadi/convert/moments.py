"""Second moments of what goes into a network's layers, ``sum x x^T``, collected while the network generates images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def collected(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, add up ``x x^T`` ``(fan_in, fan_in)`` float32 of every input of the named Linear and Conv2d layers.

    An input of a convolution is a patch ``(in kh kw)``, in the order of the kernel. Layers that are not called have no entry.
    """
    moments: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        @torch.no_grad()
        def add(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for rows in _inputs(layer, arguments[0]):
                product = rows.T @ rows
                moments[name] = moments[name] + product if name in moments else product

        return add

    handles = [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _inputs(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of a layer as rows ``(n, fan_in)`` float32; of a convolution those of one image at a time."""
    if not isinstance(layer, nn.Conv2d):
        yield x.reshape(-1, x.shape[-1]).float()
        return
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), 0
    for image in x.float():
        patches = F.unfold(image[None], layer.kernel_size, layer.dilation, padding, layer.stride)
        yield patches[0].T


def groups(fan_in: Mapping[str, int], budget: int) -> list[list[str]]:
    """Split layers into groups whose moments take at most ``budget`` bytes together (or one layer, if it alone takes more)."""
    split: list[list[str]] = []
    used = budget + 1
    for name, width in fan_in.items():
        size = 4 * width * width
        if used + size > budget:
            split.append([])
            used = 0
        split[-1].append(name)
        used += size
    return split
