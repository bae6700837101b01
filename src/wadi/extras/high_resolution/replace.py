"""Replace a method of a module for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from wadi.errors import WadiError


@contextmanager
def replaced_method(name: str, module: Any, function: Callable[..., Any], method: str = "forward") -> Iterator[None]:
    """Let ``module`` use ``function`` as its ``method`` within the block.

    The function is an attribute of the object, which hides the method of its class.

    Args:
        name: of the module, for the error message.
    Raises:
        WadiError: if the method is replaced already.
    """
    if method in vars(module):
        raise WadiError(
            f"Layer {name} has been changed already (re-dilated, or offloaded layer by layer). Leave the other context first, "
            "or offload whole models instead of layers."
        )
    setattr(module, method, function)
    try:
        yield
    finally:
        delattr(module, method)
