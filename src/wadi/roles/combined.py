"""Merge several adapters into the weights of a network, each at its own scale.

A LoRaD adapter ``k`` rotates a weight ``W`` by its angles ``theta_k``. An adapter ``m`` of any other method changes it to
``S_m``. With the scales ``s``, the merged weight is

    rot(W, sum_k s_k theta_k) + sum_m s_m (S_m - W)

Angles add, and so do changes. Every change is that of the teacher's own weight. So the order of the adapters does not matter,
a scale of 0 leaves an adapter out, and a LoRA adds ``s_m (alpha / r) B A``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.lorad.stored import set_scale
from wadi.roles.files import load, read_config
from wadi.roles.layers import adapter_layers, parameters_of
from wadi.roles.merged import merged_weight


@torch.no_grad()
def fuse_folders(model: nn.Module, scales: Mapping[Path, float]) -> None:
    """Merge the adapters ``{folder: scale}`` into the weights of ``model``, which carries none, before and after.

    The sums are computed in float32 (float64 in a float64 model) and rounded once, to the dtype of the weights. LoRaD adapters
    must have the same pairing.

    Raises:
        WadiError: as `load`. The weights are then unchanged.
    """
    rotating = _sharing_weights(model)  # PEFT cannot put every method around a layer of another one, so each has a copy
    angles: dict[str, float] = {}
    others: list[tuple[dict[str, Any], float]] = []
    for i, (folder, scale) in enumerate(scales.items()):
        if read_config(folder).get("peft_type") == "LORAD":
            angles[name := f"adapter{i}"] = scale
            load(rotating, folder, name)
            set_scale(rotating, name, scale)
        else:
            changed = _sharing_weights(model)
            load(changed, folder, "adapter")
            others.append((dict(adapter_layers(changed)), scale))
    rotated = dict(adapter_layers(rotating))
    for name in dict.fromkeys([*rotated, *(name for layers, _ in others for name in layers)]):
        base: Any = model.get_submodule(name)
        W = base.weight.detach()
        W = W if W.dtype == torch.float64 else W.float()
        merged = _rotated(rotated[name], base, W, angles) if name in rotated else W
        for layers, scale in others:
            if name in layers and scale != 0:
                merged = merged + scale * (merged_weight(layers[name], base, W, ["adapter"]) - W)
        base.weight.copy_(merged)


def _rotated(layer: Any, base: Any, W: Tensor, angles: Mapping[str, float]) -> Tensor:
    names = [name for name, scale in angles.items() if scale != 0 and any(parameters_of(layer, name))]
    return merged_weight(layer, base, W, names) if names else W


def _sharing_weights(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with modules of its own, and the tensors of ``model``."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
