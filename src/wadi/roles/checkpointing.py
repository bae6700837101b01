"""Gradient checkpointing that recomputes each block in the role that computed it.

Plain checkpointing recomputes a block during ``backward()`` with the adapters that are active by then. With several roles on
one network those may be others, and the gradient would be wrong. Here each block remembers which adapters were active.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from wadi.errors import WadiError
from wadi.roles.layers import activated, active_names, adapter_layers


def enable_checkpointing(network: Any) -> None:
    """Recompute activations of a diffusers network in the backward pass instead of storing them.

    Raises:
        WadiError: if the network does not support it.
    """

    def checkpoint_in_role(block: Any, *args: Any) -> Any:
        layers = [layer for _, layer in adapter_layers(block if isinstance(block, nn.Module) else network)]
        names = active_names(layers)
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), activated(layers, names)))

    network.enable_gradient_checkpointing(checkpoint_in_role)
    if not network.is_gradient_checkpointing:
        raise WadiError(
            f"{type(network).__name__} does not support gradient checkpointing. Set gradient_checkpointing to false."
        )
    network.train()  # diffusers checkpoints in training mode only ...
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # ... where dropout would make each pass of the teacher another network
