"""The tensors of a LoRaD adapter file: ``base_model.model.LAYER.lorad_A`` and ``.lorad_B``, as PEFT names them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from wadi.lorad.layer import LoRaDLayer

PEFT_PREFIX = "base_model.model."  # PEFT writes it before the name of every layer, whatever the method
FACTOR_A, FACTOR_B = ".lorad_A", ".lorad_B"


def is_factor(key: str) -> bool:
    """Return whether a tensor of this name belongs to a LoRaD adapter."""
    return key.endswith((FACTOR_A, FACTOR_B))


def layer_factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``{layer: (A, B)}`` for the tensors of an adapter file; other tensors are left out.

    Raises:
        KeyError: if a layer has ``A`` without ``B``.
    """
    return {
        key.removeprefix(PEFT_PREFIX).removesuffix(FACTOR_A): (A, tensors[key.removesuffix(FACTOR_A) + FACTOR_B])
        for key, A in tensors.items()
        if key.endswith(FACTOR_A)
    }


def set_scale(model: nn.Module, adapter: str, scale: float) -> None:
    """Multiply the angles of ``adapter`` by ``scale`` in every layer of ``model`` that has it."""
    for module in model.modules():
        if isinstance(module, LoRaDLayer):
            module.set_scale(adapter, scale)
