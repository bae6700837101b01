"""Distillation: a many-step teacher becomes a one-step student.

`step.py` is one training step, `loop.py` the run around it: start with these two. `objectives/` has the losses, `config.py` the
settings, `plan/` the memory that a run needs, before it starts.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from wadi.distill.config import DistillConfig


class _CallablePackage(ModuleType):
    """Python puts this package in place of the function ``wadi.distill`` once it is imported, so it can be called like it."""

    def __call__(self, config: DistillConfig) -> Path:
        from wadi.distill.loop import distill

        return distill(config)


sys.modules[__name__].__class__ = _CallablePackage
