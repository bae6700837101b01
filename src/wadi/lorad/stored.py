"""The tensors of a LoRaD adapter file: ``base_model.model.LAYER.lorad_A`` and ``.lorad_B``, as PEFT names them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.lorad.layer import LoRaDLayer

PEFT_PREFIX = "base_model.model."  # PEFT writes it before the name of every layer, for all its methods
FACTOR_A, FACTOR_B = ".lorad_A", ".lorad_B"


def is_factor(key: str) -> bool:
    """Return whether ``key`` names a factor of a LoRaD adapter; the adapter's name may follow, as in a network's state dict."""
    return any(f"{factor}." in f"{key}." for factor in (FACTOR_A, FACTOR_B))


def layer_factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``{layer: (A, B)}`` for the tensors of an adapter file; other tensors are left out.

    Raises:
        WadiError: if a layer has ``A`` without ``B``.
    """
    factors = {}
    for key, A in tensors.items():
        if key.endswith(FACTOR_A):
            B_key = key.removesuffix(FACTOR_A) + FACTOR_B
            if B_key not in tensors:
                raise WadiError(f"The LoRaD adapter has {key} without {B_key}. Restore the file as it was written.")
            factors[key.removeprefix(PEFT_PREFIX).removesuffix(FACTOR_A)] = (A, tensors[B_key])
    return factors


def set_scale(model: nn.Module, adapter: str, scale: float) -> None:
    """Multiply the angles of ``adapter`` by ``scale`` in every layer of ``model`` that has it."""
    for module in model.modules():
        if isinstance(module, LoRaDLayer):
            module.set_scale(adapter, scale)
