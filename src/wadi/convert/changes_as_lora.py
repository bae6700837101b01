"""Approximate what a student changed in its teacher's weights by a LoRA, whatever adapter trained it.

`wadi.convert.low_rank` has the mathematics, `wadi.convert.moments` the inputs of the layers that it weights by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wadi.convert.lora_files import MERGED, Lora
from wadi.convert.low_rank import nearest
from wadi.convert.moments import collected, groups
from wadi.errors import WadiError

MEMORY = 2 << 30  # bytes of second moments at a time; with more, the images are generated again for the next layers


@dataclass(frozen=True)
class LayerLoss:
    """What a LoRA of one layer loses.

    Attributes:
        rank: of the LoRA.
        change: squared change of the layer's output from teacher to student, ``E |dW x|^2 / E |W x|^2``.
        lost: share of the squared change of the output that the LoRA loses.
        by_rank: the same for powers of two and the chosen rank, up to the full rank of the layer.
    """

    name: str
    rank: int
    change: float
    lost: float
    by_rank: dict[int, float]


@dataclass(frozen=True)
class Approximation:
    """A LoRA that stands in for a student's change.

    Attributes:
        loras: by the name of the layer.
        layers: what each of them loses.
        outside: tensors that changed and are not the weight of a linear layer or a convolution. The LoRA leaves them out.
    """

    loras: dict[str, Lora]
    layers: list[LayerLoss]
    outside: list[str]

    @property
    def lost(self) -> float:
        """Share of the squared change that is lost, over all layers, weighted by the size of each layer's change."""
        return self.lost_at(None)

    def lost_at(self, rank: int | None) -> float:
        """Return `lost` at another rank, a power of two; a layer of a lower full rank loses nothing there."""
        total = sum(layer.change for layer in self.layers)
        losses = ((layer.lost if rank is None else layer.by_rank.get(rank, 0.0)) * layer.change for layer in self.layers)
        return sum(losses) / total if total else 0.0


@torch.no_grad()
def approximate(
    network: nn.Module,
    teacher: Mapping[str, Tensor],
    rank: int,
    generate: Callable[[], object],
    memory: int = MEMORY,
) -> Approximation:
    """Return the LoRA of rank ``rank`` whose layers have the outputs closest to those of the student ``network``.

    Args:
        network: the student, with merged weights.
        teacher: the weights of its teacher by name.
        generate: generates the images whose inputs to each layer count. It runs once for each group of layers that fit in
            ``memory``.
        memory: bytes of second moments at a time.
    Raises:
        WadiError: if nothing changed, or a grouped convolution changed, which a LoRA cannot express.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    weights = {f"{name}.weight": name for name in layers}
    changed: list[str] = []
    outside: list[str] = []
    for key, S in network.state_dict().items():
        if key in teacher and not torch.equal(teacher[key].to(S.dtype).to(S.device), S):
            (changed if key in weights else outside).append(weights.get(key, key))
    if not changed:
        raise WadiError("The student has the same weights as its teacher, so there is no change to write as a LoRA.")
    for name in changed:
        if getattr(layers[name], "groups", 1) != 1:
            raise WadiError(f"The student changed {name!r}, a grouped convolution, which a LoRA cannot express. {MERGED}")
    loras, losses = {}, []
    for group in groups({name: layers[name].weight[0].numel() for name in changed}, memory):
        with collected(network, group) as moments:
            generate()
        for name in group:
            W = teacher[f"{name}.weight"]
            lora, loss = _layer(name, layers[name].weight, W, rank, moments.get(name))
            loras[name] = lora
            losses.append(loss)
    return Approximation({name: loras[name] for name in changed}, losses, sorted(outside))


def _layer(name: str, weight: Tensor, W: Tensor, rank: int, moments: Tensor | None) -> tuple[Lora, LayerLoss]:
    """Return the LoRA of one layer and what it loses."""
    S = weight.detach().double()
    W = W.to(S.device).double()
    found = nearest(S - W, rank, moments)
    kernel = tuple(S.shape[2:])
    r = len(found.A)
    A = found.A.reshape(r, S.shape[1], *kernel)
    B = found.B.reshape(len(S), r, *(1 for _ in kernel))
    change = _output_change(S - W, W, moments)
    powers = (2**k for k in range(len(found.lost).bit_length()))
    by_rank = {k: float(found.lost[k]) for k in sorted({*powers, rank}) if k < len(found.lost)}
    return Lora(A.cpu(), B.cpu(), float(r)), LayerLoss(name, r, change, float(found.lost[r]), by_rank)


def _output_change(dW: Tensor, W: Tensor, moments: Tensor | None) -> float:
    """Return ``E |dW x|^2 / E |W x|^2``: how much the layer's output changed."""
    C: Any = None if moments is None else moments.double()

    def size(matrix: Tensor) -> float:
        flat = matrix.flatten(1)
        return float((flat if C is None else flat @ C).mul(flat).sum())

    whole = size(W)
    return size(dW) / whole if whole > 0 else 0.0
