"""Reuse of rotated weights across forward passes that need no gradient.

One distillation step runs an adapter several times between two updates of its angles; within
:func:`cached_rotation` its rotated weights are built once. Reuse is exact and never stale: an entry is tied
to the storages and the in-place counters of everything it was built from. Only a write through
``parameter.data`` escapes those counters; no optimiser makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RotationCache:
    """Rotated weights of one layer, by what they were asked for (adapters, scales, dtype)."""

    def __init__(self) -> None:
        self._entries: dict[tuple, tuple[list[tuple], Tensor]] = {}

    def get(self, key: tuple, sources: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
        """What ``build()`` made for ``key`` from ``sources`` as they are now; built again if one changed."""
        key = (*key, torch.is_inference_mode_enabled())
        stamp = [(id(source), source.data_ptr(), source.dtype, source._version) for source in sources]
        known = self._entries.get(key)
        if known is None or known[0] != stamp:
            with torch.no_grad():
                known = self._entries[key] = (stamp, build())
        return known[1]


def reusable(sources: Sequence[Tensor]) -> bool:
    """Whether a weight made from ``sources`` may be shared: no gradient reaches them, changes show."""
    if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
        return False
    return not torch.is_grad_enabled() or not any(source.requires_grad for source in sources)


@contextmanager
def cached_rotation(model: nn.Module) -> Iterator[None]:
    """Within this context every LoRaD layer of ``model`` rotates once for all forwards that need no gradient.

    Costs the memory of one rotated weight per layer and set of active adapters, given back at the end. Angles
    may be updated inside: the next forward sees it. Forwards that train the angles, and compiled ones, are
    not affected. Nesting is allowed; the outermost context owns the memory.
    """
    layers = [m for m in model.modules() if "rotation_cache" in vars(m) and m.rotation_cache is None]
    for layer in layers:
        layer.rotation_cache = RotationCache()  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.rotation_cache = None  # type: ignore[assignment]
