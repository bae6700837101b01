"""Schedules against the formulas that runs and recipes used before, bit for bit."""

import math

import pytest

from wadi.distill.schedules import average_weight, cosine, cosine_to_a_tenth, rise

TOTALS = (1, 7, 60, 900, 3000)


@pytest.mark.parametrize("total", TOTALS)
def test_schedules_are_the_formulas_bit_for_bit(total):
    for step in range(total + 1):
        wave = 1 + math.cos(math.pi * step / total)
        assert cosine(step, total) == 0.5 * wave
        assert cosine_to_a_tenth(step, total) == 0.1 + 0.45 * wave == 0.1 + 0.9 * 0.5 * wave
        for lr in (1e-3, 2e-3, 3.7e-4):
            climb = min(1.0, (step + 1) / 60)
            assert lr * rise(step + 1, 60) * cosine(step, total) == lr * climb * 0.5 * wave
            assert rise(step + 1, 60) * cosine(step, total) == climb * 0.5 * wave


def test_a_schedule_over_a_share_of_time():
    for share in (0.0, 0.003, 0.01, 0.37, 1.0):
        assert rise(share, 0.01) * cosine(share, 1) == min(share / 0.01, 1.0) * 0.5 * (1 + math.cos(math.pi * share))


def test_the_average_follows_faster_at_first():
    weights = [average_weight(n, 0.99) for n in range(2000)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == 1 - 1 / 10
    assert weights[-1] == 1 - 0.99
