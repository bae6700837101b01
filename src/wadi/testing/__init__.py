"""Tests for a model family of your own (docs/add-a-family.md).

`Conformance` is a class of tests that every family of the package passes; `Family` describes a small pipeline to it.
`components.py` has small parts to build the pipeline from. The tests need pytest.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.testing.conformance import Conformance, Family

__all__ = ["Conformance", "Family"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'wadi.testing' has no attribute {name!r}")
    if importlib.util.find_spec("pytest") is None:
        raise WadiError(f"wadi.testing.{name} needs pytest. Install it: pip install pytest.")
    import pytest

    if "wadi.testing.conformance" not in sys.modules:
        pytest.register_assert_rewrite("wadi.testing.conformance")  # so that a failed assertion shows its values
    from wadi.testing import conformance

    return getattr(conformance, name)
