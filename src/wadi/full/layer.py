"""Linear and Conv2d layers with a trained difference to their frozen weight.

    y = x (W + sum_k s_k dW_k)^T + bias

with the frozen weight ``W`` ``(out, in)`` or ``(out, in / groups, kh, kw)``, the difference ``dW_k`` and the scale ``s_k`` of
each active adapter ``k``. ``dW`` is float32 and starts at zero. The sum is computed in float32 and rounded once, to the dtype
of the input, so small differences are not lost in half precision. The bias stays frozen, as in the other methods.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.full.config import FullConfig
from wadi.lorad.float32_layer import Float32Layer, Float32Parameters

RANDOM_START = 0.02  # standard deviation, with init_weights=False


class FullLayer(nn.Module, Float32Layer):
    """The base class of Linear and Conv2d.

    Attributes, by adapter name: the difference ``full_delta`` with the shape of the weight, and its scale ``scaling``.
    """

    adapter_layer_names = ("full_delta",)
    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FullConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = None
        self.full_delta = Float32Parameters()
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        base: Any = self.get_base_layer()
        self.in_features = getattr(base, "in_features", None) or base.in_channels
        self.out_features = getattr(base, "out_features", None) or base.out_channels
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: FullConfig) -> None:
        """Add an adapter."""
        W = self._weight
        dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
        dW = torch.zeros(W.shape, dtype=dtype, device=W.device)
        if not config.init_weights:
            nn.init.normal_(dW, std=RANDOM_START)
        self.full_delta[adapter_name] = nn.Parameter(dW)
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def _weight(self) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        return weight

    def _difference(self, names: list[str], scaling: dict[str, float]) -> Tensor:
        """Return ``sum_k s_k dW_k`` over the adapters ``names``, at least one."""
        parts = [self.full_delta[name] if scaling[name] == 1 else scaling[name] * self.full_delta[name] for name in names]
        return sum(parts[1:], start=parts[0])

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return ``s dW`` of one adapter in float32."""
        return self._difference([adapter_name], self.scaling).clone()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the differences of the given (default: active) adapters to the base weight.

        Raises:
            WadiError: with ``safe_merge``, if the result is not finite. The base layer is then unchanged.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.full_delta]
        if not names:
            return
        W = self.get_base_weight()
        changed = (W + self._difference(names, self.scaling)).to(W.dtype)
        if safe_merge and not torch.isfinite(changed).all():
            raise WadiError(f"NaNs detected in the merged weights. The adapter {' + '.join(names)} seems to be broken")
        self.set_base_weight(changed)
        self._merged_scaling.update({name: self.scaling[name] for name in names})
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged differences. This is exact up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        W = self.get_base_weight()
        self.set_base_weight((W - self._difference(self.merged_adapters, self._merged_scaling)).to(W.dtype))
        self._merged_scaling.clear()
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.full_delta and self.scaling[name] != 0]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        dW = self._difference(names, self.scaling)
        if isinstance(self.base_layer, BaseTunerLayer):  # an adapter of another method changes the weight too, or replaces it
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y + self._product(x, dW.to(x.dtype), None).to(y.dtype)
        base: Any = self.base_layer
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return self._product(x, (base.weight + dW).to(x.dtype), bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the base layer computes with another weight and bias."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "full." + super().__repr__()


class Linear(FullLayer):
    """A linear layer ``x (W + dW)^T + bias``."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class Conv2d(FullLayer):
    """A convolution with the kernel ``W + dW``."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base: Any = self.get_base_layer()
        result: Tensor = base._conv_forward(x, weight, bias)
        return result
