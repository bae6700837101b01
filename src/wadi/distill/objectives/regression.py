"""The warm start's loss: the student's image against the teacher's own few-step sample from the same noise and prompt.

A paired loss, so it keeps what distribution matching may drop: the variety of the teacher's images.
"""

from __future__ import annotations

from torch import Tensor


def regression_loss(x0: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over latents ``(B, ...)``."""
    return (x0 - target).square().mean()
