"""Gradients of distribution matching: they move the student's image towards the teacher's distribution.

    g = sigma_t^2 (eps_real - eps_fake)                                     `vsd_gradient`, the paper's
    g = (x0_fake - x0_real) / mean |x0 - x0_real|                           `dmd_gradient`, DMD's normalised one (eq. 8 there)

``eps_real`` and ``x0_real`` come from the frozen teacher, ``eps_fake`` and ``x0_fake`` from the fake model, all at the same
noised ``x_t`` of the student's ``x0``. Both formulas have the same direction: ``eps = (x_t - alpha_t x0) / sigma_t``,
so ``sigma_t^2 (eps_real - eps_fake) = sigma_t alpha_t (x0_fake - x0_real)``.
Shapes: ``x0``, ``x_t``, predictions ``(B, ...)``; ``t`` ``(B,)``. Everything float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wadi.diffusion.process import Process, per_sample


@torch.no_grad()
def vsd_gradient(x_t: Tensor, t: Tensor, real: Tensor, fake: Tensor, process: Process) -> Tensor:
    """Return ``g``, the gradient at each entry of ``x0``; ``(B, ...)``, float32, without graph.

    Args:
        real, fake: guided predictions of teacher and fake model at ``x_t``, in the network's own prediction type.
    """
    sigma = per_sample(process.sigma(t), x_t)
    return sigma**2 * (process.eps(real, x_t, t) - process.eps(fake, x_t, t))


@torch.no_grad()
def dmd_gradient(x0: Tensor, x_t: Tensor, t: Tensor, real: Tensor, fake: Tensor, process: Process) -> Tensor:
    """Return ``g`` of DMD; arguments and result as in `vsd_gradient`."""
    x0_real = process.x0(real, x_t, t)
    return (process.x0(fake, x_t, t) - x0_real) / mean_error(x0, x0_real)


@torch.no_grad()
def mean_error(x0: Tensor, x0_real: Tensor) -> Tensor:
    """Return ``mean |x0 - x0_real|`` of each row, ``(B, 1, ..., 1)``.

    The lower bound is for a teacher that predicts exactly ``x0``: then there is no distance to divide by.
    """
    return per_sample((x0 - x0_real).abs().flatten(1).mean(1).clamp_min(1e-6), x0)


def gradient_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """Return ``1/2 mean (x0 - stopgrad(x0 - g))^2``. Its gradient at ``x0`` is ``g / numel``. It does not measure quality."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
