"""The Frechet distance against closed forms, invariances and an independent formula, singular covariances included."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raising import raises_naming
from wadi.metrics.frechet import Moments, frechet_distance, moments


def features(n, d, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def textbook(a, b):
    """The formula itself, with scipy's root of the product of the covariances."""
    a, b = a.numpy(), b.numpy()
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)


def test_is_the_textbook_formula():
    a, b = features(300, 12, 1), features(200, 12, 2, 1.5, 0.3)
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-9)


def test_is_known_for_diagonal_covariances():
    """Sum of squared differences of means and of standard deviations."""
    mean_1, mean_2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    std_1, std_2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 0.5])
    expected = float((mean_1 - mean_2).square().sum() + (std_1 - std_2).square().sum())
    assert frechet_distance((mean_1, std_1.square().diag()), (mean_2, std_2.square().diag())) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(2, 40), seed=st.integers(0, 2**16))
def test_is_a_distance_whatever_the_numbers_of_images(n, m, seed):
    """Symmetric, not negative, 0 between a set and itself, also with fewer images than the 12 dimensions."""
    a, b = features(n, 12, seed), features(m, 12, seed + 1, 0.7, 0.5)
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there == pytest.approx(back, rel=1e-9)
    assert there > 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), extra=st.integers(1, 60))
def test_singular_covariances_cost_no_accuracy(seed, extra):
    """Turning features into a space of more dimensions changes no distance, though both covariances become singular."""
    a, b = features(50, 6, seed), features(40, 6, seed + 1, 2.0, 0.1)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(6 + extra, 6, generator=generator, dtype=torch.float64)).Q.T
    plain = frechet_distance(a, b)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(plain, rel=1e-9)
    assert frechet_distance(moments(a @ turn), moments(b @ turn)) == pytest.approx(plain, rel=1e-9)


def test_no_root_of_a_rounded_zero_is_taken():
    """Of two covariances with different null spaces, rounding alone has eigenvalues of 1e-17, whose roots would count."""
    a, b = features(20, 100, 1), features(30, 100, 2)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(frechet_distance(a, b), rel=1e-11)


@pytest.mark.parametrize("count", [5, 12, 13, 90])
def test_features_moments_and_statistics_give_one_number(count):
    a, b = features(count, 12, 3), features(30, 12, 4)
    gathered = Moments(12).update(a[:2]).update(a[2:3]).update(a[3:])
    for first in (moments(a), gathered):
        assert frechet_distance(first, b) == pytest.approx(frechet_distance(a, b), rel=1e-8)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=6), shift=st.sampled_from([0.0, 1e4]))
def test_moments_do_not_depend_on_the_parts(cuts, shift):
    rows = features(60, 5, 7, shift=shift)
    gathered = Moments(5)
    edges = [0, *sorted(cuts), 60]
    for start, end in pairwise(edges):
        if end > start:
            gathered.update(rows[start:end])
    assert len(gathered) == 60
    assert torch.allclose(gathered.mean, rows.mean(0), rtol=1e-12)
    assert torch.allclose(gathered.cov, rows.T.cov(), rtol=1e-7, atol=1e-7)


def test_bad_input_is_named():
    good = features(10, 4)
    with raises_naming("1 images", "2"):
        frechet_distance(good[:1], good)
    with raises_naming("1 images", "2"):
        frechet_distance(Moments(4).update(good[:1]), good)
    with raises_naming("4 and 3"):
        frechet_distance(good, good[:, :3])
    spoilt = good.clone()
    spoilt[7, 2] = torch.nan
    with raises_naming("1 of 10", "image 7"):
        frechet_distance(spoilt, good)
    with raises_naming("NaN"):
        frechet_distance(good, (spoilt[7], torch.eye(4)))
    with raises_naming((4,), (3, 3)):
        frechet_distance(good, (torch.zeros(4), torch.eye(3)))
    with raises_naming(3, 4):
        Moments(4).update(good[:, :3])
