"""ReVersion's two formulas: noisy timesteps are preferred, and the token turns to prepositions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wadi.extras.relation.loss import PREPOSITIONS, focal_density, focal_timesteps, steering_loss

ALPHAS = st.floats(0, 1)


@given(st.integers(2, 1000), ALPHAS)
@settings(max_examples=40, deadline=None)
def test_the_density_sums_to_one_and_rises(T, alpha):
    density = focal_density(T, alpha)
    assert float(density.sum()) == pytest.approx(1)
    assert bool((density >= 0).all())
    assert bool((density.diff() >= 0).all())
    # f(t) = (1 - alpha cos(pi t / T)) / T up to normalisation: the ratio of two of its values has none
    assert float(density[-1] * (1 - alpha)) == pytest.approx(
        float(density[0] * (1 - alpha * math.cos(math.pi * (T - 1) / T))), abs=1e-12
    )


def test_alpha_zero_is_uniform_and_timesteps_follow_the_density():
    torch.testing.assert_close(focal_density(8, 0.0), torch.full((8,), 1 / 8, dtype=torch.float64))
    density = focal_density(4, 0.5)
    timesteps = focal_timesteps(density, 40_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(timesteps.bincount(minlength=4).double() / 40_000, density, atol=0.01, rtol=0)


def test_at_alpha_one_half_the_noisiest_tenth_is_three_times_as_frequent_as_the_cleanest():
    density = focal_density(1000, 0.5)
    assert float(density[-100:].sum() / density[:100].sum()) == pytest.approx(1.5 / 0.5, rel=0.03)


def test_the_steering_loss_follows_its_formula():
    g = torch.Generator().manual_seed(0)
    R, P, N = (torch.randn(shape, generator=g).double() for shape in ((5,), (3, 5), (4, 5)))
    cosine = lambda rows: (rows @ R) / rows.norm(dim=1) / R.norm()  # noqa: E731
    pull, push = (cosine(rows).div(0.3).exp().sum() for rows in (P, N))
    torch.testing.assert_close(steering_loss(R, P, N, 0.3), -(pull / (pull + push)).log())


@given(st.integers(0, 10_000), st.floats(0.05, 10))
@settings(max_examples=30, deadline=None)
def test_the_loss_depends_on_directions_and_only_the_token_has_a_gradient(seed, length):
    g = torch.Generator().manual_seed(seed)
    R, P, N = (torch.randn(shape, generator=g).double().requires_grad_() for shape in ((6,), (2, 6), (3, 6)))
    loss = steering_loss(R, P, N, 0.1)
    torch.testing.assert_close(steering_loss(length * R, P, N, 0.1), loss)
    assert float(loss) >= 0
    loss.backward()
    assert P.grad is None
    assert N.grad is None
    moved = (R - 1e-4 * R.grad).detach()
    assert float(steering_loss(moved, P, N, 0.1)) <= float(loss)


def test_descending_the_loss_turns_the_token_to_prepositions():
    P, N = torch.eye(4)[:1], torch.eye(4)[1:2]
    R = torch.tensor([0.1, 1.0, 0.5, 0.0], requires_grad=True)
    for _ in range(200):
        (grad,) = torch.autograd.grad(steering_loss(R, P, N, 0.07), R)
        R = (R - 0.05 * grad).detach().requires_grad_()
    assert float(R @ P[0]) > float(R @ N[0])


def test_the_loss_is_zero_without_things_to_push_from():
    assert float(steering_loss(torch.ones(3), torch.eye(3), torch.empty(0, 3), 0.07)) == 0


def test_prepositions_are_single_words_once_each():
    assert len(set(PREPOSITIONS)) == len(PREPOSITIONS)
    assert all(word.isalpha() and word.islower() for word in PREPOSITIONS)
