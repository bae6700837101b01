"""The change that a LoRA, LoHa, LoKr or DoRA makes to a weight, as a tensor.

- LoRA: ``s B A``; with Tucker decomposition of a convolution ``s sum_ij B_oi M_ij A_jc``.
- LoHa: ``s (W1a W1b) * (W2a W2b)``, the elementwise product.
- LoKr: ``s kron(W1, W2)``; each factor is stored as a matrix or as a product of two.
- DoRA: ``m (W + D) / |W + D| - W`` with ``D`` one of the above and the norm over the weights of each output (or input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wadi.extras.lora.entries import Entry


def weight_change(entry: Entry, scale: float, weight: Tensor) -> Tensor:
    """Return the change of ``weight`` at full strength, in float32 and the weight's shape.

    Args:
        scale: alpha over rank.
        weight: weight of the layer; only DoRA depends on its values.
    Raises:
        RuntimeError: if the shapes do not fit each other or the weight.
    """
    tensors = {name: tensor.to(weight.device).float() for name, tensor in entry.tensors.items()}
    delta = reshape_to_weight(scale * _product(tensors), weight, flat="down" not in tensors)
    for name in ("dora_scale", "lora_magnitude_vector"):
        if name in tensors:
            W = weight.float()
            by_input = name == "dora_scale" and _norm_by_input(tensors[name], weight)
            return _renormalise(W + delta, tensors[name], by_input) - W
    return delta


def reshape_to_weight(delta: Tensor, weight: Tensor, flat: bool = False) -> Tensor:
    """Return ``delta`` in the weight's shape. A 1x1 convolution may be stored as a matrix, and a matrix as a 1x1 convolution.

    Args:
        flat: also accept a convolution whose inputs and kernel are one dimension, as LoHa and LoKr store it.
    Raises:
        RuntimeError: if the shapes do not fit.
    """
    shape, weight_shape = ([*t.shape[:2], *(side for side in t.shape[2:] if side != 1)] for t in (delta, weight))
    if shape != weight_shape and not (flat and delta.ndim == 2 and shape == [len(weight), weight[0].numel()]):
        raise RuntimeError(f"the change has shape {tuple(delta.shape)} and the weight {tuple(weight.shape)}")
    return delta.reshape(weight.shape)


def _product(t: dict[str, Tensor]) -> Tensor:
    """Return the product of the factors, before scaling; a layer's tensors by name."""
    from peft.tuners.loha.layer import make_weight, make_weight_cp
    from peft.tuners.lokr.layer import make_kron
    from peft.tuners.lokr.layer import make_weight_cp as tucker

    one = torch.tensor(1.0)
    if "hada_t1" in t and "hada_t2" in t:
        factors = (t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"], t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
        product: Tensor = make_weight_cp(*factors, one)
    elif "hada_w1_a" in t:
        product = make_weight(t["hada_w1_a"], t["hada_w1_b"], t["hada_w2_a"], t["hada_w2_b"], one)
    elif "down" in t and "mid" in t:
        product = tucker(t["mid"], t["up"].flatten(1).T, t["down"].flatten(1))
    elif "down" in t:
        product = (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(len(t["up"]), *t["down"].shape[1:])
    else:
        w1, w2 = t.get("lokr_w1"), t.get("lokr_w2")
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"] if w1 is None else w1
        if w2 is None:
            a, b = t["lokr_w2_a"], t["lokr_w2_b"]
            # LyCORIS flattens the kernel of a convolution into the second matrix; the weight's shape is restored later.
            w2 = tucker(t["lokr_t2"], a, b) if "lokr_t2" in t else a @ b.flatten(1)
        product = make_kron(w1, w2)
    return product


def _norm_by_input(magnitude: Tensor, weight: Tensor) -> bool:
    """Return whether LyCORIS took a norm for each input ``(1, in, ...)`` rather than for each output ``(out, 1, ...)``."""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 != len(weight) and magnitude.shape[1] == weight.shape[1]


def _renormalise(W: Tensor, magnitude: Tensor, by_input: bool) -> Tensor:
    kept = 1 if by_input else 0
    norms = torch.linalg.vector_norm(W, dim=[d for d in range(W.ndim) if d != kept], keepdim=True)
    return W * (magnitude.reshape(norms.shape) / norms.clamp_min(torch.finfo(W.dtype).tiny))
