"""All weights of the target layers trained, as a PEFT method (type ``FULL``): an adapter that holds ``dW`` itself.

It is the reference without a limit on rank or direction. The frozen network stays as it is, so other adapters can use it too.
Importing this package registers the method. Start with `layer.py`.
"""

from wadi.full.config import FullConfig
from wadi.full.layer import FullLayer
from wadi.full.model import FullModel
from wadi.lorad.registry import register

register(FullConfig, FullModel, "FULL")

__all__ = ["FullConfig", "FullLayer", "FullModel"]
