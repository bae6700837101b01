"""Laws of the rotation itself, on plain tensors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wadi.lorad.rotation import Convolution, Factor, pair_angles, recomputed_product, rotate, rotated_weight

SIZES = st.tuples(st.integers(1, 9), st.integers(2, 13), st.integers(1, 5), st.integers(0, 2**31))


def dense_rotation(theta):
    """The block-diagonal matrix ``Q`` ``(i, i)`` that rotates one row, ``Q row``, built entry by entry."""
    n = len(theta)
    Q = torch.eye(2 * n, dtype=torch.float64)
    for j, angle in enumerate(theta.tolist()):
        block = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        Q[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = torch.tensor(block, dtype=torch.float64)
    return Q


def example(o, i, r, seed, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((o, i), (o, r), (r, i // 2)))
    return W.to(dtype), Factor(A.to(dtype), B.to(dtype), scale)


@given(SIZES, st.floats(-2, 2))
@settings(deadline=None, max_examples=60)
def test_equals_an_explicit_block_rotation_of_every_row(size, scale):
    o, i, *_ = size
    W, factor = example(*size, scale=scale)
    theta = scale * (factor.A @ factor.B)
    expected = W.clone()
    for row in range(o):
        expected[row, : i // 2 * 2] = dense_rotation(theta[row]) @ W[row, : i // 2 * 2]
    torch.testing.assert_close(rotated_weight(W, [factor]), expected)


@given(SIZES)
@settings(deadline=None, max_examples=40)
def test_both_ways_to_compute_it_agree(size):
    W, factor = example(*size)
    theta = pair_angles([factor])
    strided = torch.empty(W.shape[0], W.shape[1] + 1, dtype=W.dtype)[:, :-1].copy_(W)  # no complex view of this one
    padded = torch.cat((W, W[:, :1]), 1)[:, : W.shape[1]]
    torch.testing.assert_close(rotate(W, theta), rotate(strided, theta))
    torch.testing.assert_close(rotate(W, theta), rotate(padded, theta))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (6, 7), (6, 2, 3, 3), (6, 3, 3, 3)])
def test_angle_zero_is_the_identity_bit_for_bit(shape, dtype):
    W = torch.randn(shape).to(dtype)
    R = rotate(W, torch.zeros(6, W[0].numel() // 2))
    assert R.dtype == dtype
    assert R.shape == W.shape
    assert torch.equal(R, W)


def test_row_norms_are_kept_and_rotations_compose():
    W, factor = example(12, 10, 4, 0)
    theta = pair_angles([factor])
    R = rotate(W, theta)
    torch.testing.assert_close(R.norm(dim=1), W.norm(dim=1))
    torch.testing.assert_close(rotate(R, -theta), W)
    torch.testing.assert_close(rotate(R, theta), rotate(W, 2 * theta))
    assert (R - W).abs().max() > 0.1


def test_adapters_add_as_angles_in_any_order():
    W, a = example(6, 8, 2, 0, scale=0.7)
    _, b = example(6, 8, 3, 1, scale=-1.3)
    one_after_another = rotated_weight(rotated_weight(W, [a]), [b])
    torch.testing.assert_close(rotated_weight(W, [a, b]), one_after_another)
    torch.testing.assert_close(rotated_weight(W, [b, a]), one_after_another)


def test_a_whole_turn_is_no_turn():
    W, _ = example(6, 8, 2, 0)
    theta = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(rotate(W, theta + 2 * math.pi), rotate(W, theta))


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_small_angles_act_in_proportion_under_autocast(autocast):
    """In half precision an angle of 1e-3 loses 57 % (fp16) or all (bf16) of itself; here it loses nothing."""
    W, factor = example(64, 64, 4, 0, dtype=torch.float32)
    factor = factor._replace(A=factor.A * 1e-3 / factor.A.abs().max())
    exact = pair_angles([Factor(factor.A.double(), factor.B.double(), 1.0)])
    with torch.autocast("cpu", dtype=autocast):
        theta = pair_angles([factor])
        R = rotated_weight(W, [factor])
    assert theta.dtype == torch.float32
    assert (theta - exact).norm() / exact.norm() < 1e-6
    moved, due = (R - W).double(), rotate(W.double(), exact) - W.double()
    assert (moved - due).norm() / due.norm() < 1e-3


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_angles_of_half_precision_factors_are_float32(half):
    _, factor = example(8, 8, 2, 0, dtype=half)
    assert pair_angles([factor]).dtype == torch.float32


def gradients(function, tensors):
    return torch.autograd.grad(function(*tensors).pow(3).sum(), tensors)


@pytest.mark.parametrize("i", [8, 7])
def test_closed_form_gradient_of_the_weight(i):
    W, a = example(5, i, 3, 0)
    _, b = example(5, i, 2, 1)
    leaves = [t.requires_grad_() for t in (W, a.A, a.B, b.A, b.B)]

    def f(W, A1, B1, A2, B2):
        return rotated_weight(W, [Factor(A1, B1, 0.7), Factor(A2, B2, -2.0)])

    def reference(W, A1, B1, A2, B2):
        return rotate(W, 0.7 * A1 @ B1 - 2.0 * A2 @ B2)

    assert torch.autograd.gradcheck(f, leaves)
    torch.testing.assert_close(gradients(f, leaves), gradients(reference, leaves))


@pytest.mark.parametrize("shape", [(4, 3, 8), (8,), (5, 8)])
def test_closed_form_gradient_of_the_recomputed_linear_product(shape):
    W, a = example(5, 8, 3, 0)
    x, bias = torch.randn(shape, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, W, bias, a.A, a.B)]

    def f(x, W, bias, A, B):
        return recomputed_product(x, W, bias, None, [Factor(A, B, 0.7)])

    def reference(x, W, bias, A, B):
        return F.linear(x, rotate(W, 0.7 * A @ B), bias)

    assert torch.autograd.gradcheck(f, leaves)
    torch.testing.assert_close(gradients(f, leaves), gradients(reference, leaves))


@pytest.mark.parametrize(
    "conv",
    [Convolution((1, 1), (1, 1), (1, 1), 1), Convolution((2, 1), (0, 1), (1, 2), 2)],
    ids=["plain", "grouped"],
)
def test_closed_form_gradient_of_the_recomputed_convolution(conv):
    W, a = example(4, 4 // conv.groups * 9, 3, 0)
    W = W.view(4, 4 // conv.groups, 3, 3)
    x, bias = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, W, bias, a.A, a.B)]

    def f(x, W, bias, A, B):
        return recomputed_product(x, W, bias, conv, [Factor(A, B, 0.7)])

    def reference(x, W, bias, A, B):
        return F.conv2d(x, rotate(W, 0.7 * A @ B), bias, *conv)

    assert torch.autograd.gradcheck(f, leaves)
    torch.testing.assert_close(gradients(f, leaves), gradients(reference, leaves))
