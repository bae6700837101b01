"""The spread that is reported against the scatter of many sets of images, and diversity."""

import itertools
import math
import statistics

import pytest
import torch

from raising import raises_naming
from wadi.metrics import diversity, frechet
from wadi.metrics.diversity import diversity_of_each_prompt, diversity_spread, image_distances, same_prompt_diversity
from wadi.metrics.kernel import kernel_distance
from wadi.metrics.neighbours import halves, membership, recall_spread
from wadi.metrics.spread import nearest_prompts, spread_from_influence

TOLERANCE = (0.7, 1.45)  # estimate / scatter: 60 sets tell the scatter to 9 %, 8 estimates differ by about as much
SETS, ESTIMATED = 60, 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count, dim, prompts, shift, seed):
    """Features of one image of each prompt, whose share ``prompts`` of the variance is the prompt's; those come in pairs."""
    scale = torch.arange(1, dim + 1).double() ** -0.5
    centre = normal(count // 2, dim, seed=1).repeat_interleave(2, 0) + 0.1 * normal(count, dim, seed=2)
    own = (1 - prompts) ** 0.5 * (1 + shift) * normal(count, dim, seed=seed)
    return (prompts**0.5 * centre + own + shift) * scale


def measured(fake, reference, gaussian, nearest):
    """Value and function that gives the spread, by metric."""
    of = membership(reference, fake, 3)
    kernel = kernel_distance(fake, reference, 20, min(len(fake), len(reference)) // 2, nearest=nearest)
    means = {"precision": of.precision.double(), "density": of.density, "score": fake[:, 0]}
    return {
        "frechet": (frechet.frechet_distance(fake, gaussian), lambda: frechet.frechet_spread(fake, gaussian, nearest)),
        "kernel": (kernel.value, lambda: kernel.spread),
        "recall": (float(of.recall.double().mean()), lambda: recall_spread(reference, fake, 3)),
        "coverage": (float(of.coverage.double().mean()), lambda: spread_from_influence(of.coverage_influence, nearest)),
        **{name: (float(rows.mean()), lambda rows=rows: spread_from_influence(rows, nearest)) for name, rows in means.items()},
    }


@pytest.mark.parametrize(
    ("count", "dim", "reference", "prompts", "shift"),
    [(256, 16, 512, 0.0, 0.2), (128, 32, 1000, 0.5, 0.2), (96, 128, 256, 0.0, 0.0), (96, 128, 256, 0.5, 0.0)],
    ids=["many images", "prompts that come in pairs", "fewer images than dimensions", "fewer, and prompts"],
)
def test_the_spread_is_the_scatter_of_sets_from_other_seeds(count, dim, reference, prompts, shift):
    """Every metric with a reference, and a score of each image; the reference and the prompts are the same in all sets."""
    real = normal(reference, dim, seed=3) * torch.arange(1, dim + 1).double() ** -0.5
    gaussian, nearest = frechet.gaussian(real), torch.arange(count) ^ 1 if prompts else None
    values, spreads = {}, {}
    for seed in range(SETS):
        for name, (value, spread) in measured(images(count, dim, prompts, shift, 100 + seed), real, gaussian, nearest).items():
            values.setdefault(name, []).append(value)
            if seed < ESTIMATED:
                spreads.setdefault(name, []).append(spread())
    ratios = {name: statistics.fmean(spreads[name]) / statistics.stdev(values[name]) for name in values}
    assert all(TOLERANCE[0] < ratio < TOLERANCE[1] for ratio in ratios.values()), ratios


def test_similar_prompts_take_the_scatter_between_prompts_away():
    """The same images: four fifths of the variance of a score are the prompts', which new seeds do not change."""
    fake = images(400, 16, 0.8, 0.0, 5)[:, 0]
    plain, paired = spread_from_influence(fake), spread_from_influence(fake, torch.arange(400) ^ 1)
    assert paired / plain == pytest.approx(math.sqrt(0.2 + 0.8 * 0.01), rel=0.15)


@pytest.mark.parametrize("size", [8, 4])
def test_the_spread_of_diversity_is_the_scatter_over_seeds(size):
    groups = [i for i in range(12) for _ in range(size)]
    sets = [normal(12, size, 16, seed=i) * (1 + torch.arange(12) % 4)[:, None, None] for i in range(150)]
    values = [same_prompt_diversity(of.flatten(0, 1), groups) for of in sets]
    spreads = [diversity_spread(of.flatten(0, 1), groups) for of in sets[:20]]
    assert TOLERANCE[0] < statistics.fmean(spreads) / statistics.stdev(values) < TOLERANCE[1]


def test_few_images_of_a_prompt_give_the_scatter_between_prompts():
    groups = [i for i in range(40) for _ in range(2)]
    rows = normal(80, 8)
    assert diversity_spread(rows, groups) == pytest.approx(float(diversity_of_each_prompt(rows, groups).std()) / math.sqrt(40))
    assert math.isnan(diversity_spread(rows[:2], [0, 0]))


def test_the_variance_of_a_mean_distance_is_unbiased():
    """Against its definition as a sum over all quadruples that differ."""
    x = normal(6, 3)
    d = torch.cdist(x, x)
    apart = [d[i, j] * d[k, m] for i, j, k, m in itertools.permutations(range(6), 4)]
    whole = float(torch.nn.functional.pdist(x).mean()) ** 2 - float(torch.stack(apart).mean())
    assert diversity._variance_of_mean_distance(d) == pytest.approx(whole)


@pytest.mark.parametrize(("count", "dim"), [(30, 8), (12, 20)], ids=["covariance of full rank", "fewer images than dimensions"])
def test_the_influence_is_the_derivative_by_the_weight_of_an_image(count, dim):
    """By differences of the distance of weighted moments."""
    fake, real = normal(count, dim) * 1.3 + 0.2, normal(50, dim, seed=1)
    found = frechet.influence(fake, real)

    def distance(weights):
        mean = weights @ fake
        centred = fake - mean
        return frechet.frechet_distance((mean, centred.T @ (weights[:, None] * centred) * count / (count - 1)), real)

    for i in (0, 5):
        step = torch.full((count,), 1 / count, dtype=torch.float64)
        bump = torch.zeros_like(step)
        bump[i] = 1e-5
        slope = (distance(step + bump - 1e-5 / count) - distance(step - bump + 1e-5 / count)) / 2e-5
        assert slope == pytest.approx(float(found[i] - found.mean()), rel=1e-3, abs=1e-3)


def test_the_influence_on_coverage_is_that_of_leaving_an_image_out():
    real, fake = normal(60, 4), normal(40, 4, seed=1) + 0.3
    of = membership(real, fake, 3)
    value = float(of.coverage.double().mean())
    for i in range(40):
        rest = torch.cat([fake[:i], fake[i + 1 :]])
        without = float(membership(real, rest, 3).coverage.double().mean())
        assert float(of.coverage_influence[i]) == pytest.approx(39 * (value - without))


def test_a_frechet_distance_accepts_a_reference_that_is_factorised_once():
    fake, real = normal(40, 8), normal(60, 8, seed=1)
    once = frechet.gaussian(real)
    assert frechet.frechet_distance(fake, once) == frechet.frechet_distance(fake, real)
    assert frechet.frechet_spread(fake, once) == frechet.frechet_spread(fake, real)


def test_the_correction_of_a_sample_is_that_of_all_images(monkeypatch):
    """Pairs of images add a quarter of the part that half as many images add."""
    fake, real = normal(1024, 24) * 1.02, normal(600, 24, seed=1)
    whole = frechet.frechet_spread(fake, real)
    monkeypatch.setattr(frechet, "SAMPLE", 512)
    assert frechet.frechet_spread(fake, real) == pytest.approx(whole, rel=0.05)
    assert whole < 0.95 * spread_from_influence(frechet.influence(fake, real))


def test_halves_are_halves_and_others_in_each_division():
    free = halves(8, 20)
    assert (free.sum(1) == 4).all()
    assert len(free.unique(dim=0)) > 10


def test_nearest_prompts_share_their_rare_words():
    prompts = ["a red apple", "a blue car", "an apple, red and ripe", "the car in blue", "tree"]
    assert nearest_prompts(prompts)[:4].tolist() == [2, 3, 0, 1]
    assert nearest_prompts(["same", "other", "same", "Same!"]).tolist()[::2] == [2, 3]
    assert nearest_prompts(["x"] * 300).tolist() == [*range(1, 300), 0]
    assert nearest_prompts(["one", "two", "three"]).tolist() == [1, 2, 0]
    assert nearest_prompts(["犬", "猫", "犬 と", ""])[0] == 2


def test_an_image_is_never_its_own_neighbour():
    prompts = [f"{a} {b}" for a in ("red", "blue", "") for b in ("apple", "car", "tree", "")] * 20
    near = nearest_prompts(prompts)
    assert (near != torch.arange(len(prompts))).all()
    assert all(prompts[i] == prompts[j] for i, j in enumerate(near.tolist()))


def test_what_has_no_spread_is_an_error():
    with raises_naming("1 images"):
        spread_from_influence(torch.zeros(1))
    with raises_naming("NaN"):
        spread_from_influence(torch.tensor([0.0, torch.nan]))
    with raises_naming("1 prompts"):
        nearest_prompts(["x"])
    assert recall_spread(normal(20, 2), normal(7, 2), 3) is None


def test_diversity_is_the_mean_over_pairs_of_each_prompt():
    """All groups have the same weight, whatever their size and the order of their images."""
    rows, groups = normal(7, 3), ["a", "b", "a", "c", "b", "a", "c"]
    expected = []
    for group in "abc":
        members = [row for row, g in zip(rows.tolist(), groups, strict=True) if g == group]
        distances = [math.dist(p, q) for p, q in itertools.combinations(members, 2)]
        expected.append(sum(distances) / len(distances))
    assert diversity_of_each_prompt(rows, groups).tolist() == pytest.approx(expected)
    assert same_prompt_diversity(rows, groups) == pytest.approx(sum(expected) / 3)
    assert same_prompt_diversity(rows[:1].expand(4, 3), [0, 0, 1, 1]) == 0


def test_diversity_by_a_distance_of_images():
    images = torch.randint(0, 256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def mean_difference(a, b):
        return (a.float() - b.float()).abs().mean((1, 2, 3))

    found = image_distances(images, ["x", "y", "y", "x"], mean_difference)
    expected = [(images[i].float() - images[j].float()).abs().mean() for i, j in ((0, 3), (1, 2))]
    assert found.tolist() == pytest.approx([float(e) for e in expected])


def test_prompts_with_one_image_are_named():
    with raises_naming("1 of 2 prompts", "'b'"):
        same_prompt_diversity(normal(3, 2), ["a", "a", "b"])
    with raises_naming("3 images", "2 prompts"):
        same_prompt_diversity(normal(3, 2), ["a", "a"])


def test_rare_words_decide_which_prompt_is_nearest():
    """Not those that nearly every prompt of a protocol has."""
    things = ["cat", "dog", *(f"thing{i}" for i in range(20))]
    prompts = [*(f"a photo of a {thing} here now" for thing in things), "cat"]
    assert int(nearest_prompts(prompts)[0]) == len(things)
