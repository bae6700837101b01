"""Reuse of rotated weights across forward passes that need no gradient.

One distillation step runs an adapter several times between two updates of its angles; within
:func:`cached_rotation` its rotated weights are built once. Reuse is exact and never stale: an entry is tied to
the storages and the in-place counters of everything it was built from, and every optimiser step ends it, since
fused optimisers write without counting. Only a write through ``parameter.data`` outside an optimiser escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


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

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


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
    layers: list[Any] = [m for m in model.modules() if "rotation_cache" in vars(m) and m.rotation_cache is None]
    caches = [RotationCache() for _ in layers]

    def clear(*_: Any) -> None:
        for cache in caches:
            cache.clear()

    hook = register_optimizer_step_post_hook(clear)
    for layer, cache in zip(layers, caches, strict=True):
        layer.rotation_cache = cache
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer.rotation_cache = None
