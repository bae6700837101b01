"""The kernel distance against its double sum, and that it is unbiased."""

import statistics

import numpy as np
import pytest
import torch

from raising import raises_naming
from wadi.metrics.kernel import kernel_distance, mmd2


def features(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_is_the_double_sum_of_its_definition():
    x, y = features(7, 3, 1).tolist(), features(5, 3, 2, 0.4).tolist()

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    within = [
        sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1)) for s in (x, y)
    ]
    between = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    assert mmd2(torch.tensor(x).double(), torch.tensor(y).double()) == pytest.approx(sum(within) - 2 * between, rel=1e-5)


def test_a_single_whole_subset_is_the_estimate_itself():
    x, y = features(20, 4, 1), features(20, 4, 2, 0.5)
    found = kernel_distance(x, y, subsets=3, subset_size=20)
    assert found.value == pytest.approx(mmd2(x, y))
    assert found.std == pytest.approx(0, abs=1e-12)


def test_is_unbiased():
    """Over many pairs of sets of one distribution it is 0 on average, within four standard errors, on both sides of 0."""
    values = torch.tensor([mmd2(features(10, 4, 2 * i), features(10, 4, 2 * i + 1)) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 400**0.5
    assert (values < 0).any()
    assert (values > 0).any()


def test_repeats_with_its_seed_and_grows_with_distance():
    x = features(60, 4, 1)
    near, far = features(60, 4, 2, 0.3), features(60, 4, 3, 1.0)
    first = kernel_distance(x, near, 20, 30, seed=5)
    assert first == kernel_distance(x, near, 20, 30, seed=5)
    assert first != kernel_distance(x, near, 20, 30, seed=6)
    assert kernel_distance(x, far, 20, 30).value > first.value > kernel_distance(x, features(60, 4, 4), 20, 30).value


def test_bad_input_is_named():
    x = features(20, 4, 1)
    with raises_naming("20 images", "1000"):
        kernel_distance(x, x)
    with raises_naming("4 and 3"):
        kernel_distance(x, x[:, :3], 1, 10)
    with raises_naming("0 subsets"):
        kernel_distance(x, x, 0, 10)
    with raises_naming("NaN"):
        kernel_distance(x * torch.inf, x, 1, 10)


def test_the_deviation_is_that_of_the_subsets():
    """The subsets are drawn again here in the order of torch-fidelity. The divisor is the number of subsets."""
    x, y = features(30, 4, 1), features(25, 4, 2, 0.4)
    random = np.random.RandomState(3)
    values = []
    for _ in range(7):
        one, two = random.choice(30, 10, replace=False), random.choice(25, 10, replace=False)
        values.append(mmd2(x[one], y[two]))
    found = kernel_distance(x, y, subsets=7, subset_size=10, seed=3)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.std == pytest.approx(statistics.pstdev(values))
    assert found.std != pytest.approx(statistics.stdev(values), rel=0.01)
    assert found.spread < found.std  # of their mean, not of one of them
