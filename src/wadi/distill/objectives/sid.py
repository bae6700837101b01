"""Score identity Distillation (SiD, arXiv 2404.04057) with long and short guidance (SiD-LSG, arXiv 2406.01561).

    d = x0_teacher - x0_fake,  both predicted at x_t = alpha_t x0 + sigma_t eps
    student:     mean d ((x0_teacher - x0) - a d) / mean |x0 - x0_teacher|  =  ((1 - a) |d|^2 + d (x0_fake - x0)) / ...
    fake model:  denoising loss of its guided prediction

``a`` is the option ``alpha``. The gradient flows through the fake model and the teacher: a step takes more memory than with the
other objectives. With long and short guidance the fake model is trained with the scale (``fake_training_guidance``) at which it
is evaluated; by default all scales are the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wadi.distill import health
from wadi.distill.objectives.base import FakeDefaults, Loss, Networks, Objective, Rows, require
from wadi.distill.objectives.score import mean_error


@dataclass(frozen=True)
class SiDOptions:
    """Options of SiD.

    Attributes:
        alpha: weight ``a`` of the squared distance that is taken off; 0.5 to 1.2 in the paper.
        fake_training_guidance: guidance scale of the fake model while it is trained; null = that of the teacher.
    """

    alpha: float = 1.0
    fake_training_guidance: float | None = None

    def __post_init__(self) -> None:
        require(-10 <= self.alpha <= 10, "alpha", self.alpha, "from -10 to 10")
        scale = self.fake_training_guidance
        require(scale is None or -100 <= scale <= 100, "fake_training_guidance", scale, "from -100 to 100")


class SiD(Objective):
    """SiD's losses; all guidance scales are the teacher's unless given."""

    Options = SiDOptions
    fake_defaults = FakeDefaults(guidance_scale=None, updates=1, weighting="none")
    options: SiDOptions

    def student_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the loss; its graph reaches the student through ``x0``, the teacher and the fake model."""
        process, t = networks.process, rows.draws["t"]
        x_t = process.add_noise(rows.x0, rows.draws["eps"], t)
        x0_real = process.x0(networks.teacher(x_t, t, rows.condition, self.config.guidance_scale), x_t, t)
        x0_fake = process.x0(networks.fake(x_t, t, rows.condition, self.fake_guidance_scale), x_t, t)
        distance = x0_real - x0_fake
        terms = distance * ((x0_real - rows.x0) - self.options.alpha * distance) / mean_error(rows.x0, x0_real)
        with torch.no_grad():
            distances = health.distance_sums(x0_real, x0_fake, t, process.num_timesteps)
        return Loss(terms.mean(), distances)

    def fake_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the denoising loss of the guided prediction."""
        process, t = networks.process, rows.draws["t"]
        scale = self.options.fake_training_guidance
        x_t = process.add_noise(rows.x0, rows.draws["eps"], t)
        prediction = networks.fake(x_t, t, rows.condition, self.config.guidance_scale if scale is None else scale)
        return Loss(self.denoising(prediction, rows, x_t, process))
