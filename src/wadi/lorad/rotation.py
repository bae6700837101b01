"""The arithmetic of LoRaD: low-rank angles rotate neighbouring pairs of weight columns.

Symbols (arXiv 2603.08258, section 3; ``o`` = fan-out, ``i`` = fan-in, ``r`` = rank):

- ``W``      ``(o, i)`` frozen weight; a convolution kernel ``(o, i/groups, kh, kw)`` is read as that matrix;
- ``A``      ``(o, r)`` and ``B`` ``(r, i // 2)``: the trained factors of one adapter, with a scale ``s``;
- ``theta``  ``(o, i // 2) = sum over adapters of s A B``: angles in radians, no modulo;
- ``R``      ``(o, i)``: the rotated weight. With ``e``/``o`` the even/odd columns of a matrix,
  ``R_e = W_e cos(theta) - W_o sin(theta)``, ``R_o = W_e sin(theta) + W_o cos(theta)``; an odd last column
  stays.

Read as a complex number, a pair is rotated by a product with ``exp(i theta)``. It is computed in this way if the
memory layout allows it. The gradient needs no trigonometry: with ``G = dL/dR``, ``dL/dtheta = R_e G_o - R_o G_e``,
``dL/dA = s dL/dtheta B^T``, ``dL/dB = s A^T dL/dtheta``.

Angles, sine and cosine are float32 under any autocast and for any weight (float64 for float64 factors).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class Factor(NamedTuple):
    """One adapter's part of the angles of a layer: ``scale * A @ B``."""

    A: Tensor  # (o, r)
    B: Tensor  # (r, i // 2)
    scale: float


class Convolution(NamedTuple):
    """How a kernel is applied: the arguments of ``F.conv2d`` after the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which angles are computed: float32, or float64 for float64 factors."""
    return torch.promote_types(dtype, torch.float32)


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def pair_angles(factors: Sequence[Factor]) -> Tensor:
    """Return the angles in radians, ``theta = sum s A B``, ``(o, i // 2)``, float32 (float64 for float64 factors)."""
    (A, B, scale), *others = factors
    dtype = _exact(A.dtype)
    with _no_autocast(A):
        theta = A.to(dtype) @ B.to(dtype)
        if scale != 1.0:
            theta = theta * scale
        for A, B, scale in others:
            theta = torch.addmm(theta, A.to(dtype), B.to(dtype), alpha=scale)
    return theta


def _as_complex(W: Tensor) -> Tensor | None:
    """Return ``W`` ``(o, i)`` as complex numbers ``(o, i / 2)`` without a copy, or None if its layout does not allow it.

    Compiled code gets None too: the compiler fuses the real arithmetic, and cannot generate complex arithmetic.
    """
    if torch.compiler.is_compiling() or W.device.type not in ("cpu", "cuda"):
        return None
    if W.shape[1] % 2 or not W.is_contiguous() or W.storage_offset() % 2:
        return None
    return torch.view_as_complex(W.view(W.shape[0], -1, 2))


def rotate(W: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate every pair of neighbouring columns of ``W`` by its angle.

    ``W`` is ``(o, i)`` or ``(o, ...)`` with ``i`` the product of the rest, ``theta`` ``(o, i // 2)`` in
    radians. Computed in ``theta``'s dtype (float64 for a float64 ``W``), returned in ``dtype`` (``W``'s if
    None) and in ``W``'s shape. Row norms are kept, angle zero is exactly the identity, and
    ``rotate(rotate(W, a), b) = rotate(W, a + b)``. Plain autograd can differentiate it, so it is the reference
    for :func:`rotated_weight`.
    """
    exact = torch.float64 if W.dtype == torch.float64 else theta.dtype
    matrix = W.flatten(1).to(exact)
    pairs = _as_complex(matrix)
    if pairs is not None:
        turned = torch.polar(torch.ones((), dtype=theta.dtype, device=theta.device), theta)
        R = torch.view_as_real(pairs * turned).flatten(1)
    else:
        cos, sin = torch.cos(theta), torch.sin(theta)
        paired = matrix[:, : 2 * theta.shape[1]]
        even, odd = paired[:, 0::2], paired[:, 1::2]
        R = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(1)
        if matrix.shape[1] % 2:
            R = torch.cat((R, matrix[:, -1:]), 1)
    return R.view(W.shape).to(dtype or W.dtype)


def _angle_gradient(R: Tensor, G: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``dL/dtheta = R_e G_o - R_o G_e``, shape ``(o, i // 2)``, in ``dtype``."""
    R, G = R.flatten(1), G.flatten(1)
    even = slice(0, R.shape[1] // 2 * 2, 2)
    R, G = R.to(dtype), G.to(dtype)
    return torch.addcmul(R[:, even] * G[:, 1::2], R[:, 1::2], G[:, even], value=-1)


def _factor_gradients(
    R: Tensor, G: Tensor, scales: Sequence[float], tensors: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of ``(A1, B1, A2, B2, ...)``, None where not ``needed``."""
    grads: list[Tensor | None] = [None] * len(tensors)
    if not any(needed):
        return grads
    with _no_autocast(R):
        dtype = _exact(tensors[0].dtype)
        d_theta = _angle_gradient(R, G, dtype)
        for k, scale in enumerate(scales):
            A, B = tensors[2 * k], tensors[2 * k + 1]
            scaled = d_theta if scale == 1.0 else d_theta * scale
            if needed[2 * k]:
                grads[2 * k] = (scaled @ B.to(dtype).T).to(A.dtype)
            if needed[2 * k + 1]:
                grads[2 * k + 1] = (A.to(dtype).T @ scaled).to(B.dtype)
    return grads


def _pack(scales: Sequence[float], tensors: Sequence[Tensor]) -> list[Factor]:
    return [Factor(tensors[2 * k], tensors[2 * k + 1], scale) for k, scale in enumerate(scales)]


class _RotatedWeight(Function):
    """``W, A, B -> R``. Autograd keeps only ``R``, and the model's own factors."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, dtype: torch.dtype, scales: tuple[float, ...], *tensors: Tensor) -> Tensor:
        R = rotate(W, pair_angles(_pack(scales, tensors)), dtype)
        ctx.scales, ctx.dtype_of_W = scales, W.dtype
        ctx.save_for_backward(R, *tensors)
        return R

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        R, *tensors = ctx.saved_tensors
        need_W, _, _, *needed = ctx.needs_input_grad
        dW = None
        if need_W:
            dW = rotate(G, -pair_angles(_pack(ctx.scales, tensors)), ctx.dtype_of_W)
        return dW, None, None, *_factor_gradients(R, G, ctx.scales, tensors, needed)


def rotated_weight(W: Tensor, factors: Sequence[Factor], dtype: torch.dtype | None = None) -> Tensor:
    """Return ``R`` in ``dtype`` (``W``'s if None), with the shape of ``W``. Autograd keeps only ``R``."""
    if not torch.is_grad_enabled():
        return rotate(W, pair_angles(factors), dtype)
    scales = tuple(factor.scale for factor in factors)
    tensors = [tensor for factor in factors for tensor in factor[:2]]
    return _RotatedWeight.apply(W, dtype or W.dtype, scales, *tensors)


def product(x: Tensor, R: Tensor, bias: Tensor | None, conv: Convolution | None) -> Tensor:
    """Return the layer's product: ``x R^T + bias``, or the convolution of ``x`` with ``R``."""
    return F.linear(x, R, bias) if conv is None else F.conv2d(x, R, bias, *conv)


def _product_backward(
    g: Tensor, x: Tensor, R: Tensor, conv: Convolution | None, need_x: bool, need_R: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``dL/dx`` and ``dL/dR`` of :func:`product` from ``g = dL/dy``."""
    if conv is not None:
        dx, G, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            R,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [need_x, need_R, False],
        )
        return dx, G
    dx = g @ R if need_x else None
    G = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if need_R else None
    return dx, G


class _RecomputedProduct(Function):
    """``product(x, R, bias)`` that keeps nothing of the size of ``R``: the backward pass rotates again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        conv: Convolution | None,
        scales: tuple[float, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.conv, ctx.scales = conv, scales
        ctx.save_for_backward(x, W, *tensors)
        with _no_autocast(x):
            R = rotate(W, pair_angles(_pack(scales, tensors)), x.dtype)
            return product(x, R, bias, conv)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, *tensors = ctx.saved_tensors
        need_x, need_W, need_bias, _, _, *needed = ctx.needs_input_grad
        with _no_autocast(g):
            theta = pair_angles(_pack(ctx.scales, tensors))
            R = rotate(W, theta, x.dtype)
            dx, G = _product_backward(g, x, R, ctx.conv, need_x, need_W or any(needed))
            dW = rotate(G, -theta, W.dtype) if need_W and G is not None else None
            grads: list[Tensor | None] = [None] * len(tensors)
            if G is not None:
                grads = _factor_gradients(R, G, ctx.scales, tensors, needed)
            d_bias = None
            if need_bias:
                d_bias = g.sum((0, 2, 3)) if ctx.conv else g.reshape(-1, g.shape[-1]).sum(0)
        return dx, dW, d_bias, None, None, *grads


def recomputed_product(
    x: Tensor, W: Tensor, bias: Tensor | None, conv: Convolution | None, factors: Sequence[Factor]
) -> Tensor:
    """Return ``product(x, rotated_weight(W, factors), bias, conv)``. Autograd keeps nothing of the size of ``W``.

    ``x`` is ``(..., i)`` or ``(batch, channels, height, width)``, and has the dtype of the product, as has ``bias``.
    It costs one more rotation in the backward pass. The product itself is computed once.
    """
    scales = tuple(factor.scale for factor in factors)
    tensors = [tensor for factor in factors for tensor in factor[:2]]
    return _RecomputedProduct.apply(x, W, bias, conv, scales, *tensors)
