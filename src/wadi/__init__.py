"""wadi: one-step text-to-image generators by training rotation angles only (arXiv 2603.08258).

``import wadi`` is cheap: it imports neither torch nor diffusers. The names below are loaded on first use,
and LoRaD is registered with PEFT the moment PEFT is imported (at once if it already is).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from wadi._peft_hook import register_when_peft_is_imported
from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.distill.config import DistillConfig
    from wadi.distill.loop import distill
    from wadi.lorad import LoRaDConfig, LoRaDModel
    from wadi.pipelines.load import load

__version__ = "0.1.0"

_HOMES = {
    "DistillConfig": "wadi.distill.config",
    "LoRaDConfig": "wadi.lorad",
    "LoRaDModel": "wadi.lorad",
    "distill": "wadi.distill.loop",
    "load": "wadi.pipelines.load",
}
__all__ = ["DistillConfig", "LoRaDConfig", "LoRaDModel", "WadiError", "distill", "load"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'wadi' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_when_peft_is_imported()
