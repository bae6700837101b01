"""The fake model's loss: denoise the student's images.

    'alpha2'    mean (alpha_t eps_fake - alpha_t noise)^2                   the paper's
    'none'      mean (prediction - target)^2, both of the network's own type

For epsilon-prediction the two differ by ``alpha_t^2``. For v-prediction they differ by ``alpha_t^4``: then the noisy timesteps,
which matter most for a one-step student, have almost no weight. Shapes: all tensors ``(B, ...)``, ``t`` ``(B,)``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from wadi.diffusion.process import Process, per_sample


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor,
    x_t: Tensor,
    t: Tensor,
    process: Process,
    weighting: Literal["alpha2", "none"] = "alpha2",
) -> Tensor:
    """Return the scalar loss of the network's own ``prediction`` at ``x_t = alpha_t x0 + sigma_t noise``."""
    if weighting == "none":
        return (prediction - process.join(x0, noise, t)).square().mean()
    alpha = per_sample(process.alpha(t), x_t)
    return (alpha * (process.eps(prediction, x_t, t) - noise)).square().mean()
