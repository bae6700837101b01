"""Pairs of weights with known changes in norm and direction, and known rank."""

import math

import pytest
import torch

from wadi.analysis import analyze, spectrum
from wadi.analysis.spectrum import FRACTIONS, exact, rank_at, sketched
from wadi.lorad.rotation import rotate
from wadi.roles.change import angles_of, compare_rows, exchange_rows, mean_changes, norm_change_of_noise


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(W, angle):
    """Every pair of columns turned by one angle: every row turns by it, and keeps its norm."""
    return rotate(W, torch.full((W.shape[0], W.flatten(1).shape[1] // 2), angle, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6, 8), (5, 4, 3, 3), (70, 100_000)], ids=["linear", "kernel", "in parts"])
def test_scaling_is_norm_alone_and_rotation_direction_alone(shape):
    W = weight(*shape)
    factors = torch.linspace(0.5, 2.0, shape[0], dtype=torch.float64).view(-1, *[1] * (W.ndim - 1))
    longer = compare_rows(W, factors * W)
    torch.testing.assert_close(longer.norm, (factors.flatten() - 1).abs())
    assert longer.direction.max() < 1e-28
    assert longer.residual.abs().max() < 1e-15
    along = compare_rows(W, turned(W, 0.3))
    torch.testing.assert_close(along.direction, torch.full((shape[0],), 1 - math.cos(0.3), dtype=torch.float64))
    assert along.norm.max() < 1e-12
    torch.testing.assert_close(along.residual.double().square().sum() / 2, along.direction.sum())  # they are one thing
    assert along.undefined == longer.undefined == 0


def test_a_layers_point_is_mean_and_deviation_over_its_rows():
    W = weight(4, 6)
    S = W.clone()
    S[0] *= 1.1
    S[1] = turned(W, 0.2)[1]
    layer = analyze.measure_layer("x", W, S)
    norms, directions = torch.tensor([0.1, 0, 0, 0]).double(), torch.tensor([0, 1 - math.cos(0.2), 0, 0]).double()
    assert layer.norm_mean == pytest.approx(float(norms.mean()), rel=1e-6)
    assert layer.norm_std == pytest.approx(float(norms.std(correction=0)), rel=1e-6)
    assert layer.direction_mean == pytest.approx(float(directions.mean()), rel=1e-6)
    assert layer.direction_std == pytest.approx(float(directions.std(correction=0)), rel=1e-6)


def test_small_turns_are_not_lost_to_rounding():
    W = weight(3, 4)
    layer = analyze.measure_layer("x", W, turned(W, 1e-9))
    assert layer.direction_mean == pytest.approx(5e-19, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_exactly(dtype):
    W = (100 * weight(8, 5000)).to(dtype)  # the sum of squares overflows fp16, and bf16 would lose small terms
    S = (100 * turned(weight(8, 5000), 0.3)).to(dtype)
    stored, wide = compare_rows(W, S), compare_rows(W.double(), S.double())
    assert torch.equal(stored.norm, wide.norm)
    assert torch.equal(stored.direction, wide.direction)
    assert stored.direction.mean() == pytest.approx(1 - math.cos(0.3), rel=1e-3)
    assert stored.norm.mean() < 2 * torch.finfo(dtype).eps


def test_rows_of_zero_norm_are_left_out_and_counted():
    W, S = weight(5, 6), turned(weight(5, 6), 0.4)
    W[0], S[1], W[2], S[2] = 0, 0, 0, 0  # born, died, never there
    rows = compare_rows(W, S)
    assert rows.undefined == 3
    assert len(rows.direction) == 2
    torch.testing.assert_close(
        rows.norm, torch.tensor([1.0, 0, 0]).double(), atol=1e-12, rtol=0
    )  # the one that died, two turned
    assert not rows.residual[:3].any()
    assert rows.residual.isfinite().all()
    nothing = analyze.measure_layer("x", torch.zeros(3, 4), torch.ones(3, 4))
    assert (nothing.norm_mean, nothing.direction_mean, nothing.energy, nothing.undefined) == (None, None, None, 3)


def test_hybrids_have_the_norms_of_one_and_the_directions_of_the_other():
    W, S = weight(5, 4, 3, 3), 3 * weight(5, 4, 3, 3, seed=1)
    norms, directions = exchange_rows(W, S, "norm"), exchange_rows(W, S, "direction")
    of = compare_rows
    assert max(of(W, norms).norm.max(), of(S, norms).direction.max()) < 1e-12
    assert max(of(S, directions).norm.max(), of(W, directions).direction.max()) < 1e-12
    assert of(W, norms).direction.min() > 0.1
    assert of(W, directions).norm.min() > 0.1
    assert exchange_rows(W.half(), S.half(), "norm").dtype == torch.float16


def test_hybrids_keep_the_students_row_where_a_direction_is_wanting():
    W, S = weight(3, 4), weight(3, 4, seed=1)
    W[0], S[1] = 0, 0
    assert torch.equal(exchange_rows(W, S, "direction")[0], S[0])
    assert torch.equal(exchange_rows(W, S, "direction")[1], torch.zeros(4).double())
    assert not exchange_rows(W, S, "norm")[:2].any()


# --- ranks ------------------------------------------------------------------------------------------------------------------


def of_spectrum(sigma, shape, seed=0):
    """A float32 matrix with the given singular values."""
    U, V = (torch.linalg.qr(weight(side, len(sigma), seed=seed + i)).Q for i, side in enumerate(shape))
    return (U * torch.as_tensor(sigma, dtype=torch.float64) @ V.T).float()


def test_a_planted_residual_has_its_energy_curve():
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    for shape in ((10, 40), (40, 10)):
        found = exact(of_spectrum(sigma, shape))
        torch.testing.assert_close(found.energies[:3], sigma.square(), rtol=1e-6, atol=0)
        assert found.total == pytest.approx(14)
        assert spectrum.energy_at(found, 10) == (pytest.approx(1.0), 0.0)
        assert spectrum.energy_at(found, 10, 0.2) == (pytest.approx(13 / 14), 0.0)
        curve = spectrum.curve(found, 10)
        assert len(curve) == len(FRACTIONS)
        assert curve[FRACTIONS.index(0.1)] == pytest.approx(9 / 14)
        assert curve[-1] == pytest.approx(1.0)


def test_the_residual_of_a_layer_is_where_its_rank_is_read():
    """Rows of one norm moved in a plane of their own: the residual is exactly of rank 2."""
    basis = torch.linalg.qr(weight(32, 32)).Q
    W = basis[:20].clone()
    S = W.clone()
    S[0], S[1] = math.cos(0.5) * basis[0] + math.sin(0.5) * basis[30], math.cos(0.2) * basis[1] + math.sin(0.2) * basis[31]
    layer = analyze.measure_layer("up_blocks.1.resnets.0.conv1", W.float(), 2 * S.float())
    energies = [2 * (1 - math.cos(0.5)), 2 * (1 - math.cos(0.2))]  # 20 rows: 1 and 2 singular values at 5 and 10 percent
    assert layer.energy[FRACTIONS.index(0.06)] == pytest.approx(energies[0] / sum(energies), rel=1e-5)
    assert layer.energy[FRACTIONS.index(0.1)] == pytest.approx(1.0, rel=1e-6)
    assert layer.energy_30 == pytest.approx(1.0, rel=1e-6)
    assert layer.norm_mean == pytest.approx(1.0, rel=1e-6)


def test_thirty_percent_is_never_more_than_that():
    assert [rank_at(0.3, full) for full in (1, 3, 10, 129, 320)] == [1, 1, 3, 38, 96]


@pytest.mark.parametrize(("dtype", "changed"), [(torch.float16, 1.0), (torch.float32, 1.1), (torch.bfloat16, 1.1)])
def test_rounding_is_no_residual(dtype, changed):
    W = weight(32, 64).to(dtype)
    layer = analyze.measure_layer("x", W, (changed * W.double()).to(dtype))
    assert layer.energy is None
    assert layer.energy_30 is None
    assert layer.direction_mean < torch.finfo(dtype).eps ** 2


SPECTRA = {
    "low rank": [5.0, 4.0, 3.0, 0.5],
    "decaying": [0.9**i for i in range(80)],
    "steep": [0.5**i for i in range(60)],
    "flat": [1.0] * 80,
    "a step at the edge": [1.0] * 30 + [0.3] * 50,
}


@pytest.mark.parametrize("shape", [(80, 200), (200, 80)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_sketch_keeps_its_bound(name, shape):
    E = of_spectrum(SPECTRA[name], shape)
    truth, rank = exact(E), 24
    for seed in range(5):
        found = sketched(E, rank, seed)
        low, true = found.energies.cumsum(0), truth.energies[:rank].cumsum(0)
        rounding = 1e-5 * truth.total
        assert len(found.energies) == rank
        assert found.total == pytest.approx(truth.total, rel=1e-6)
        assert (low <= true + rounding).all()
        assert (true <= low + found.missing + rounding).all()
        value, missing = spectrum.energy_at(found, 80)
        assert value <= spectrum.energy_at(truth, 80)[0] + 1e-5
        assert value + missing >= spectrum.energy_at(truth, 80)[0] - 1e-5
        assert missing == pytest.approx(min(found.missing / found.total, 1 - value))  # a share, as the value is
    if name in ("low rank", "steep"):
        assert found.missing < 1e-4 * truth.total  # where the bound is of use
        torch.testing.assert_close(low / truth.total, true / truth.total, rtol=0, atol=1e-5)
    if name == "flat":
        assert found.missing > 0.3 * truth.total  # and where it says that it is not


def test_a_large_layer_is_sketched_and_its_curve_ends_where_nothing_is_known():
    W = weight(80, 90)
    S = W + weight(80, 3, seed=1) @ weight(3, 90, seed=2) * 0.05
    whole, part = analyze.measure_layer("x", W, S), analyze.measure_layer("x", W, S, exact_up_to=60)
    assert whole.exact
    assert not part.exact
    assert whole.energy_missing == 0 < part.energy_missing
    assert part.energy_30 <= whole.energy_30 <= part.energy_30 + part.energy_missing
    last = FRACTIONS.index(0.3)
    assert part.energy[: last + 1] == pytest.approx(whole.energy[: last + 1], abs=2e-3)
    assert part.energy[-1] is None
    assert (part.direction_mean, part.norm_std) == (whole.direction_mean, whole.norm_std)


def test_the_fast_means_are_those_of_the_exact_rows():
    W = weight(6, 4, 3, 3)
    S = W + 0.1 * weight(6, 4, 3, 3, seed=1)
    rows = compare_rows(W, S)
    expected = torch.stack([rows.norm.mean(), rows.direction.mean()])
    torch.testing.assert_close(mean_changes(W.float(), S.float()).double(), expected, rtol=1e-4, atol=0)
    W[0] = 0
    assert mean_changes(W, W).tolist() == [0, 0]


@pytest.mark.parametrize(("fan_in", "size"), [(64, 0.01), (64, 0.2), (1000, 0.05)])
def test_noise_changes_norms_as_the_formula_says(fan_in, size):
    """Relative to rows of norm 1, noise of ``size`` in all: small, it changes norms through its part along the row; large, it
    lengthens rows."""
    W = torch.nn.functional.normalize(weight(4000, fan_in))
    rows = compare_rows(W, W + size / fan_in**0.5 * weight(4000, fan_in, seed=1))
    expected = norm_change_of_noise(rows.direction, fan_in).mean()
    assert float(rows.norm.mean()) == pytest.approx(float(expected), rel=0.05)


def test_a_rotation_keeps_norms_far_better_than_noise_would():
    W = weight(50, 64)
    layer = analyze.measure_layer("x", W, turned(W, 0.3))
    assert layer.angle_mean == pytest.approx(0.3)
    assert layer.norm_mean < 1e-12 < 0.01 < layer.norm_chance


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, 3.0, math.pi])
def test_angles_are_exact_at_both_ends(angle):
    W = weight(3, 4)
    assert angles_of(compare_rows(W, turned(W, angle)).direction).tolist() == pytest.approx([angle] * 3, rel=1e-5, abs=1e-12)
