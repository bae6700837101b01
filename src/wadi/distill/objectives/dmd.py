"""Distribution Matching Distillation (DMD, arXiv 2311.18828): the gradient is divided by the teacher's own error.

    g = (x0_fake - x0_teacher) / mean |x0 - x0_teacher|
    student:     1/2 mean (x0 - stopgrad(x0 - g))^2
    fake model:  mean (prediction - target)^2, the network's own prediction, without guidance

DMD's regression on the teacher's samples is ``warm_start.weight``, which works with every objective.
"""

from __future__ import annotations

from torch import Tensor

from wadi.distill.objectives.base import FakeDefaults, Networks
from wadi.distill.objectives.score import dmd_gradient
from wadi.distill.objectives.vsd import VSD


class DMD(VSD):
    """VSD with DMD's normalised gradient and an unguided fake model."""

    fake_defaults = FakeDefaults(guidance_scale=1.0, updates=1, weighting="none")

    def gradient(self, x0: Tensor, x_t: Tensor, t: Tensor, real: Tensor, fake: Tensor, networks: Networks) -> Tensor:
        """Return ``g`` ``(B, C, H, W)``, without graph."""
        return dmd_gradient(x0, x_t, t, real, fake, networks.process)
