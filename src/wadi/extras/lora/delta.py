"""What a LoRA, LoHa, LoKr or DoRA adds to a weight, as a tensor.

- LoRA: ``s B A``; with Tucker decomposition of a convolution ``s sum_ij B_oi M_ij A_jc``.
- LoHa: ``s (W1a W1b) * (W2a W2b)``, the elementwise product.
- LoKr: ``s kron(W1, W2)``; each factor whole or a product itself.
- DoRA: ``m (W + D) / |W + D| - W`` with ``D`` one of the above and the norm over each output's (or input's) weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wadi.extras.lora.file import Entry


def change(entry: Entry, scale: float, weight: Tensor) -> Tensor:
    """Return what the layer's adapter at full strength adds to ``weight``, float32 and of its shape.

    Args:
        scale: alpha over rank.
        weight: of the layer; only DoRA depends on its values.
    Raises:
        RuntimeError: if the shapes do not fit each other or the weight.
    """
    tensors = {name: tensor.to(weight.device).float() for name, tensor in entry.tensors.items()}
    delta = fitted(scale * _product(tensors), weight, flat="down" not in tensors)
    for name in ("dora_scale", "lora_magnitude_vector"):
        if name in tensors:
            W = weight.float()
            by_input = name == "dora_scale" and _by_input(tensors[name], weight)
            return _renormalised(W + delta, tensors[name], by_input) - W
    return delta


def fitted(delta: Tensor, weight: Tensor, flat: bool = False) -> Tensor:
    """``delta`` in the weight's shape: 1x1 convolutions may be written as matrices and the reverse.

    Args:
        flat: also with a convolution's inputs and kernel as one dimension, as LoHa and LoKr have them.
    """
    shape, wanted = ([*t.shape[:2], *(side for side in t.shape[2:] if side != 1)] for t in (delta, weight))
    if shape != wanted and not (flat and delta.ndim == 2 and shape == [len(weight), weight[0].numel()]):
        raise RuntimeError(f"the change has shape {tuple(delta.shape)} and the weight {tuple(weight.shape)}")
    return delta.reshape(weight.shape)


def _product(t: dict[str, Tensor]) -> Tensor:
    from peft.tuners.loha.layer import make_weight, make_weight_cp
    from peft.tuners.lokr.layer import make_kron
    from peft.tuners.lokr.layer import make_weight_cp as tucker

    one = torch.tensor(1.0)
    if "hada_t1" in t and "hada_t2" in t:
        factors = (t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"], t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
        made: Tensor = make_weight_cp(*factors, one)
    elif "hada_w1_a" in t:
        made = make_weight(t["hada_w1_a"], t["hada_w1_b"], t["hada_w2_a"], t["hada_w2_b"], one)
    elif "down" in t and "mid" in t:
        made = tucker(t["mid"], t["up"].flatten(1).T, t["down"].flatten(1))
    elif "down" in t:
        made = (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(len(t["up"]), *t["down"].shape[1:])
    else:
        w1, w2 = t.get("lokr_w1"), t.get("lokr_w2")
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"] if w1 is None else w1
        if w2 is None:
            a, b = t["lokr_w2_a"], t["lokr_w2_b"]
            # LyCORIS flattens the kernel of a convolution into the second matrix; the weight's shape is restored later.
            w2 = tucker(t["lokr_t2"], a, b) if "lokr_t2" in t else a @ b.flatten(1)
        made = make_kron(w1, w2)
    return made


def _by_input(magnitude: Tensor, weight: Tensor) -> bool:
    """Whether LyCORIS took a norm for each input ``(1, in, ...)`` rather than for each output ``(out, 1, ...)``."""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 != len(weight) and magnitude.shape[1] == weight.shape[1]


def _renormalised(W: Tensor, magnitude: Tensor, by_input: bool) -> Tensor:
    kept = 1 if by_input else 0
    norms = torch.linalg.vector_norm(W, dim=[d for d in range(W.ndim) if d != kept], keepdim=True)
    return W * (magnitude.reshape(norms.shape) / norms.clamp_min(torch.finfo(W.dtype).tiny))
