"""Peak memory is that of a call's own tensors and its weights, each counted once."""

import pytest
import torch
from torch import nn

from wadi.evaluate.peak_memory import cpu_peak, peak_mib

MIB = 2**20


def tensors(*mib):
    return [torch.empty(int(size * MIB), dtype=torch.uint8) for size in mib]


def test_the_peak_is_what_lives_at_once():
    def call():
        first = tensors(4)
        second = tensors(8)
        del first
        third = tensors(3)  # 8 + 3 at most now, less than the 12 before
        return len(second) + len(third)

    assert cpu_peak(call) == pytest.approx(12 * MIB, rel=0.01)


def test_what_was_there_before_does_not_count():
    kept = tensors(64)
    assert cpu_peak(lambda: tensors(2)) == pytest.approx(2 * MIB, rel=0.01)
    assert len(kept) == 1


def test_a_second_call_has_the_same_peak():
    def call():
        return torch.randn(512, 512) @ torch.randn(512, 512)

    assert cpu_peak(call) == cpu_peak(call) == pytest.approx(3 * MIB, rel=0.01)


def test_weights_are_counted_once():
    layer = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    both = nn.ModuleList([layer, layer])
    assert peak_mib(lambda: tensors(2), [layer, both, layer]) == pytest.approx(6, rel=0.01)
