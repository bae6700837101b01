"""The weights of a role: what `fuse` would write, layer by layer in float32, without a change to the network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wadi.roles.layers import adapted_layers, adapter_layers, plain_name


@torch.no_grad()
def merged_weights(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield ``(layer, W, S)`` of each layer of adapter ``name``: the frozen and the merged weight, float32 (or float64).

    The weights of a network that is sharded over processes are gathered one at a time. This communicates. Layers whose
    weights are quantised are left out.
    """
    own = set(adapted_layers(model, name))
    for layer_name, layer in list(adapter_layers(model)):
        if plain_name(layer_name) in own and any(name in getattr(layer, part, {}) for part in layer.adapter_layer_names):
            base = layer.get_base_layer()
            if isinstance(base, nn.Linear | nn.Conv2d) and base.weight.is_floating_point():
                W = _whole(base.weight)
                yield plain_name(layer_name), W, merged_weight(layer, base, W, [name])


def merged_weight(layer: Any, base: Any, W: Tensor, names: list[str]) -> Tensor:
    """Return the weight after PEFT's own merge of ``names`` into a copy of the layer that shares only their parameters.

    Args:
        layer: with the adapters.
        base: layer that ``layer`` is around; ``W`` is used in place of its weight.
    """
    plain, twin = copy.copy(base), copy.copy(layer)
    plain._parameters = {"weight": nn.Parameter(W.clone(), requires_grad=False), "bias": None}
    # PEFT's merge keeps lists and caches on the layer: the twin has its own
    for key, value in vars(layer).items():
        if isinstance(value, dict | list | set):
            twin.__dict__[key] = copy.copy(value)
    twin._modules["base_layer"] = plain
    twin.merge(adapter_names=names)
    merged: Tensor = plain.weight.detach()
    return merged


def _whole(weight: Any) -> Tensor:
    """Return a weight in float32 (or float64), gathered from all processes if it is sharded."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()
    return whole if whole.dtype == torch.float64 else whole.float()
