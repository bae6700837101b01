"""Muon moves a weight along an orthogonal matrix, further for a tall one."""

import pytest
import torch

from wadi.zoo.recipe.optim import Muon


@pytest.mark.parametrize(("shape", "scale"), [((32, 8), 2.0), ((8, 32), 1.0)])
def test_a_tall_weight_moves_further(shape, scale):
    """By ``sqrt(rows / columns)``, so that its outputs change as much as those of a square one."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    Muon([{"params": [weight], "muon": True}], lr=0.1).step()
    assert 0.1 * scale * 0.6 < torch.linalg.svdvals(weight.detach()).mean() < 0.1 * scale * 1.2
