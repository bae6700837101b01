"""The warm start's loss: the student's image against the teacher's own few-step sample from the same noise and prompt.

Because each image has its own target, this loss keeps the variety of the teacher's images. Distribution matching may lose it.
"""

from __future__ import annotations

from torch import Tensor


def regression_loss(x0: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over latents ``(B, ...)``."""
    return (x0 - target).square().mean()
