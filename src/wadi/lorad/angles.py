"""Look at the angles of LoRaD adapters in any ``nn.Module``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wadi.io.patterns import matching_names
from wadi.lorad.layer import LoRaDLayer


@torch.no_grad()
def layer_angles(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(layer, Theta)`` for each layer of a LoRaD adapter; nothing if the adapter is of another method.

    ``Theta = A @ B`` has shape ``(out, fan_in // 2)``, in radians, float32.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, LoRaDLayer) and adapter in layer.lorad_A:
            yield name, layer.lorad_A[adapter].float() @ layer.lorad_B[adapter].float()


def largest_rank(model: nn.Module, target_modules: str, columns: int = 2) -> int | None:
    """Return the largest rank that the angles of any target layer can have, ``min(out, fan_in // 2)``.

    Args:
        columns: of the weight that share an angle; 1 gives the largest rank of a change of the weight itself.
        target_modules: regular expression that matches whole names of layers.
    Returns:
        None if it matches no layer.
    Raises:
        WadiError: if it is not a regular expression, or takes too long to match.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    ranks = []
    for name in matching_names(target_modules, list(layers), "target_modules"):
        layer = layers[name]
        out, fan_in = layer.weight.flatten(1).shape
        if isinstance(layer, nn.Linear):  # the stored weight of a quantized layer has another shape
            out, fan_in = layer.out_features, layer.in_features
        ranks.append(min(out, fan_in // columns))
    return max(ranks, default=None)


def set_factors(layer: nn.Module, adapter: str, A: Tensor, B: Tensor) -> None:
    """Give the LoRaD adapter of a layer new factors ``A`` ``(out, r)`` and ``B`` ``(r, fan_in // 2)``."""
    assert isinstance(layer, LoRaDLayer)
    layer.lorad_A[adapter], layer.lorad_B[adapter] = nn.Parameter(A), nn.Parameter(B)
