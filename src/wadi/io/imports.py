"""Objects by their names in tables such as the families of pipelines: nothing is imported that nobody uses."""

from __future__ import annotations

import importlib
from typing import Any


def imported(place: str) -> Any:
    """Return the object at ``"module:name"``, and import its module if that has not happened yet."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
