"""Variational Score Distillation, the objective of the paper (WaDi, arXiv 2603.08258).

x_t = alpha_t x0 + sigma_t eps,  t ~ U[0.02 T, 0.98 T]
g = sigma_t^2 (eps_teacher(x_t, t, c) - eps_fake(x_t, t, c))            both guided
student:     1/2 mean (x0 - stopgrad(x0 - g))^2
fake model:  mean (alpha_t eps_fake - alpha_t noise)^2                  at a fresh t ~ U[0, T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from wadi.distill import health
from wadi.distill.objectives.base import FakeDefaults, Loss, Networks, Objective, Rows
from wadi.distill.objectives.score import gradient_loss, vsd_gradient


class VSD(Objective):
    """The paper's losses: both scores guided by the same scale, one update of the fake model per step."""

    fake_defaults = FakeDefaults(guidance_scale=None, updates=1, weighting="alpha2")

    def student_loss(self, networks: Networks, rows: Rows) -> Loss:
        """Return the loss whose gradient at ``x0`` is ``g``."""
        process, t = networks.process, rows.draws["t"]
        with torch.no_grad():
            x_t = process.add_noise(rows.x0.detach(), rows.draws["eps"], t)
            real, fake = self.predictions(networks, x_t, t, rows)
            distances = health.distance_sums(process.x0(real, x_t, t), process.x0(fake, x_t, t), t, process.num_timesteps)
        return Loss(gradient_loss(rows.x0, self.gradient(rows.x0, x_t, t, real, fake, networks)), distances)

    def predictions(self, networks: Networks, x_t: Tensor, t: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the guided predictions of teacher and fake model."""
        return (
            networks.teacher(x_t, t, rows.condition, self.config.guidance_scale),
            networks.fake(x_t, t, rows.condition, self.fake_guidance_scale),
        )

    def gradient(self, x0: Tensor, x_t: Tensor, t: Tensor, real: Tensor, fake: Tensor, networks: Networks) -> Tensor:
        """Return ``g`` ``(B, C, H, W)``, without graph."""
        return vsd_gradient(x_t, t, real, fake, networks.process)
