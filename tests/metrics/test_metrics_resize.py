"""Resizing against filters written out by hand. The filter changes an FID by points, so each must match its name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raising import raises_naming
from wadi.metrics.resize import FILTERS, resize


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def cubic(x):
    x = np.abs(x)  # Keys' kernel with a = -1/2
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def weights(old, new):
    """``(new, old)``: the cubic kernel stretched over the area of a new pixel, renormalised at the borders."""
    scale = old / new
    centre = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    found = cubic((np.arange(old) - centre) / max(scale, 1))
    return found / found.sum(1, keepdims=True)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(3, 40), width=st.integers(3, 40), size=st.integers(3, 40))
def test_clean_is_the_antialiased_bicubic_clipped_but_not_rounded(height, width, size):
    image = picture(height, width)
    expected = np.einsum("yh,chw,xw->cyx", weights(height, size), image.double().numpy(), weights(width, size))
    assert np.abs(resize(image, size).numpy() - expected.clip(0, 255)).max() < 2e-3


@pytest.mark.parametrize("filter", FILTERS)
def test_no_filter_leaves_the_range(filter):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, 4:] = 255
    found = resize(image, 16, filter)
    assert (float(found.min()), float(found.max())) == (0, 255)


@pytest.mark.parametrize("filter", FILTERS)
def test_a_flat_image_stays_flat_and_the_right_size_is_unchanged(filter):
    flat = torch.full((3, 10, 7), 77, dtype=torch.uint8)
    assert torch.allclose(resize(flat, 13, filter), torch.full((3, 13, 13), 77.0), atol=1e-3)
    assert torch.equal(resize(picture(9, 9), 9, filter), picture(9, 9).float())


def test_only_clean_filters_see_all_pixels():
    """Columns black, black, black, white: a quarter white. Bilinear without antialiasing sees two of them at best."""
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, 3::4] = 255
    for filter in FILTERS:
        mean = float(resize(stripes, 16, filter)[:, 4:-4, 4:-4].mean())
        assert (abs(mean - 255 / 4) < 2) == filter.startswith("clean"), (filter, mean)


def test_legacy_filters_differ_in_the_position_of_pixels():
    ramp = torch.tensor([0.0, 100.0, 200.0, 300.0]).div(2).expand(3, 4, 4)
    assert resize(ramp, 8, "legacy-tf")[0, 0].tolist() == [0, 25, 50, 75, 100, 125, 150, 150]
    assert resize(ramp, 8, "legacy-torch")[0, 0].tolist() == [0, 12.5, 37.5, 62.5, 87.5, 112.5, 137.5, 150]
    assert resize(ramp, 2, "legacy-tf")[0, 0].tolist() == [0, 100]
    assert resize(ramp, 2, "legacy-torch")[0, 0].tolist() == [25, 125]


def test_an_unknown_filter_is_named():
    with raises_naming("'bicubic'", *FILTERS):
        resize(picture(4, 4), 8, "bicubic")
