"""Precision, recall, density and coverage against loops over pairs, ties and duplicates included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raising import raises_naming
from wadi.metrics.neighbours import prdc, radii

POINTS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=4, max_size=14)


def by_hand(real, fake, k):
    """The definitions, one pair of points at a time."""

    def reach(points):
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    inside_real = [[math.dist(r, f) < reach_r for r, reach_r in zip(real, reach(real), strict=True)] for f in fake]
    inside_fake = [[math.dist(r, f) < reach_f for f, reach_f in zip(fake, reach(fake), strict=True)] for r in real]
    return (
        sum(any(row) for row in inside_real) / len(fake),
        sum(any(row) for row in inside_fake) / len(real),
        sum(sum(row) for row in inside_real) / (k * len(fake)),
        sum(any(column) for column in zip(*inside_real, strict=True)) / len(real),
    )


@settings(max_examples=80, deadline=None)
@given(real=POINTS, fake=POINTS, k=st.integers(1, 3), block=st.integers(1, 20))
def test_are_their_definitions_whatever_the_block(real, fake, k, block):
    """Points on a small lattice: many equal distances, and often a point twice."""
    found = prdc(torch.tensor(real).double(), torch.tensor(fake).double(), k, block)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(by_hand(real, fake, k))


def test_a_set_covers_itself_and_not_a_far_one():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    same, far = prdc(x, x), prdc(x, x + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_a_collapsed_fake_has_precision_without_recall():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    clump = x[:1] + 0.01 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    found = prdc(x, clump)
    assert found.precision == 1
    assert found.recall < 0.05
    assert found.coverage < 0.1


def test_copies_far_from_the_origin_are_at_distance_zero():
    """Rounding of the products must not make a distance of a duplicate: here it would be about 1e-2."""
    x = 1e5 + torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).double()
    assert radii(torch.cat([x, x]), 1).eq(0).all()


def test_memory_is_a_block_and_not_the_table(monkeypatch):
    from wadi.metrics import neighbours

    largest = 0
    plain = neighbours._blocks

    def watched(x, y, block):
        nonlocal largest
        for start, distance in plain(x, y, block):
            largest = max(largest, distance.numel())
            yield start, distance

    monkeypatch.setattr(neighbours, "_blocks", watched)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    prdc(x, x + 0.1, block=16)
    assert largest == 16 * 300


def test_bad_input_is_named():
    x = torch.zeros(3, 2)
    with raises_naming("3 images", "k = 3", "4"):
        prdc(x, torch.zeros(9, 2))
    with raises_naming("3 images"):
        prdc(torch.zeros(9, 2), x)
    with raises_naming("2 and 5"):
        prdc(torch.zeros(9, 2), torch.zeros(9, 5))
    with raises_naming("k is 0"):
        prdc(x, x, 0)
    with raises_naming("NaN"):
        prdc(torch.full((9, 2), torch.nan), torch.zeros(9, 2))
