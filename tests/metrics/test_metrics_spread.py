"""Bootstrap intervals and diversity."""

import itertools
import math

import pytest
import torch

from wadi.errors import WadiError
from wadi.metrics.bootstrap import interval
from wadi.metrics.diversity import diversity, pairwise, per_group
from wadi.metrics.frechet import frechet_distance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Means of 200 sets of 60 normal numbers: 80 % intervals hold 0 in 80 % of them, within four standard errors."""
    held = [(found.low < 0 < found.high) for i in range(200) for found in [interval(torch.mean, normal(60, seed=i), level=0.8)]]
    assert abs(sum(held) / 200 - 0.8) < 4 * (0.8 * 0.2 / 200) ** 0.5


def test_the_spread_of_a_mean_is_the_standard_error():
    found = interval(torch.mean, normal(400), rounds=600)
    assert found.value == pytest.approx(float(normal(400).mean()))
    assert found.std == pytest.approx(float(normal(400).std()) / 20, rel=0.15)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.std, rel=0.15)


def test_a_distance_lies_in_its_interval_though_resampling_moves_it_up():
    found = interval(frechet_distance, normal(40, 24), normal(40, 24, seed=1) + 0.2, rounds=50)
    assert found.bias > 3 * found.std
    assert found.low < found.value < found.high


def test_pairs_stay_pairs_and_samples_of_their_own_do_not():
    x = normal(50)
    assert interval(lambda a, b: (a - b).abs().sum(), x, x, rounds=5, paired=True).std == 0
    assert interval(lambda a, b: (a - b).abs().sum(), x, x, rounds=5).std > 0


def test_the_interval_repeats_with_its_seed():
    assert interval(torch.mean, normal(20), seed=3) == interval(torch.mean, normal(20), seed=3)
    assert interval(torch.mean, normal(20), seed=3) != interval(torch.mean, normal(20), seed=4)


@pytest.mark.parametrize(
    ("arrays", "options", "told"),
    [
        ((), {}, "at least one array"),
        ((torch.zeros(1),), {}, "2 images"),
        ((torch.zeros(3),), {"rounds": 1}, "rounds is 1"),
        ((torch.zeros(3),), {"level": 95}, "level is 95"),
        ((torch.zeros(3), torch.zeros(4)), {"paired": True}, "as many in each"),
    ],
)
def test_what_cannot_be_resampled_is_told(arrays, options, told):
    with pytest.raises(WadiError, match=told):
        interval(torch.mean, *arrays, **options)


def test_diversity_is_the_mean_over_pairs_of_each_prompt():
    """Groups count alike, whatever their size and wherever their images stand."""
    rows, groups = normal(7, 3), ["a", "b", "a", "c", "b", "a", "c"]
    expected = []
    for group in "abc":
        members = [row for row, g in zip(rows.tolist(), groups, strict=True) if g == group]
        distances = [math.dist(p, q) for p, q in itertools.combinations(members, 2)]
        expected.append(sum(distances) / len(distances))
    assert per_group(rows, groups).tolist() == pytest.approx(expected)
    assert diversity(rows, groups) == pytest.approx(sum(expected) / 3)
    assert diversity(rows[:1].expand(4, 3), [0, 0, 1, 1]) == 0


def test_diversity_by_a_distance_of_images():
    images = torch.randint(0, 256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def mean_difference(a, b):
        return (a.float() - b.float()).abs().mean((1, 2, 3))

    found = pairwise(images, ["x", "y", "y", "x"], mean_difference)
    expected = [(images[i].float() - images[j].float()).abs().mean() for i, j in ((0, 3), (1, 2))]
    assert found.tolist() == pytest.approx([float(e) for e in expected])


def test_prompts_with_one_image_are_told():
    with pytest.raises(WadiError, match=r"1 of 2 prompts have a single image, 'b'"):
        diversity(normal(3, 2), ["a", "a", "b"])
    with pytest.raises(WadiError, match="3 images and 2 prompts"):
        diversity(normal(3, 2), ["a", "a"])
