"""How learning rates and the moving average of weights depend on the step, as pure functions."""

from __future__ import annotations

import math


def rise(done: float, warmup: float) -> float:
    """Return the share of the learning rate during warm-up: it grows linearly to 1 at ``done = warmup`` and stays there."""
    return min(1.0, done / warmup)


def cosine(done: float, total: float) -> float:
    """Return ``(1 + cos(pi done / total)) / 2``: it falls from 1 at ``done = 0`` to 0 at ``done = total``."""
    return 0.5 * (1 + math.cos(math.pi * done / total))


def cosine_to_a_tenth(step: int, steps: int) -> float:
    """Return `cosine` stretched so that it falls from 1 to 0.1."""
    return 0.1 + 0.9 * cosine(step, steps)


def average_weight(updates: int, decay: float) -> float:
    """Return the weight of the newest value in a moving average with ``decay``, for update number ``updates``.

    ``1 - min(decay, (1 + n) / (10 + n))``: at first the average follows faster, so that it forgets where it began.
    """
    return 1 - min(decay, (1 + updates) / (10 + updates))
