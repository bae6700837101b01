"""Linear and Conv2d layers whose weight is rotated by LoRaD adapters.

All adapters of a layer rotate in the same fixed planes (by default, of neighbouring columns). So the angles of active
adapters add, a scale multiplies them, and unmerging rotates back. The layer's product is computed once, with the
rotated weight, in the dtype of the input (under autocast, in autocast's dtype).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.lorad.config import LoRaDConfig
from wadi.lorad.float32_layer import Float32Layer, Float32Parameters
from wadi.lorad.pairing import with_partners_together
from wadi.lorad.rotation import Convolution, Factor, pair_angles, product, recomputed_product, rotate, rotated_weight


class LoRaDLayer(Float32Layer):
    """The base class of LoRaD's Linear and Conv2d.

    Attributes, by adapter name: factors ``lorad_A`` ``(out, r)`` and ``lorad_B`` ``(r, fan_in // 2)``, rank
    ``r``, and the scale ``scaling`` of the angles.
    """

    adapter_layer_names = ("lorad_A", "lorad_B")
    other_param_names = ("r", "scaling", "recompute", "pairing")

    def __init__(self, base_layer: nn.Module, quantization_backend: Any = None) -> None:
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.lorad_A, self.lorad_B = Float32Parameters(), Float32Parameters()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.recompute: dict[str, bool] = {}
        self.pairing: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features, self.fan_in = self._features()

    def _features(self) -> tuple[int, int, int]:
        """Return ``in_features, out_features, fan_in`` of the base layer (channels for a convolution)."""
        raise NotImplementedError

    def _convolution(self, x: Tensor) -> tuple[Tensor, Convolution | None]:
        """Return the input for the product, and how a kernel is applied (None for a linear layer)."""
        return x, None

    # --- adapters -----------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, config: LoRaDConfig, key: str = "") -> None:
        """Add an adapter of rank ``r``. ``key`` is the layer's name in error messages."""
        r = self._checked_rank(r, config, key or type(self.get_base_layer()).__name__)
        self.r[adapter_name], self.scaling[adapter_name] = r, 1.0
        self.recompute[adapter_name], self.pairing[adapter_name] = config.recompute, config.pairing
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.lorad_A[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype))
        self.lorad_B[adapter_name] = nn.Parameter(torch.empty(r, self.fan_in // 2, dtype=dtype))
        self.reset_lorad_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _checked_rank(self, r: int, config: LoRaDConfig, key: str) -> int:
        most = min(self.out_features, self.fan_in // 2)
        if r <= most or config.excess_rank == "allow":
            return r
        if config.excess_rank == "cap":
            return most
        raise WadiError(
            f"LoRaD: the rank of {key} is {r}, but its angles ({self.out_features} x {self.fan_in // 2}) have rank "
            f"{most} at most. Lower r, give this layer its own rank in rank_pattern, name it in "
            "exclude_modules, or set excess_rank to 'cap' or 'allow'."
        )

    def reset_lorad_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Initialise ``B`` Xavier-uniform, and ``A`` to zero, so that the layer starts as its base (or Xavier-uniform)."""
        nn.init.xavier_uniform_(self.lorad_B[adapter_name])
        if init_weights:
            nn.init.zeros_(self.lorad_A[adapter_name])
        else:
            nn.init.xavier_uniform_(self.lorad_A[adapter_name])

    def store_like_base(self, adapter_name: str) -> None:
        """Store the factors of an adapter in the base weight's dtype, if that is a floating-point dtype."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for angles in (self.lorad_A, self.lorad_B):
            if dtype is not None and dtype.is_floating_point:
                angles[adapter_name] = angles[adapter_name].to(dtype)

    # --- weights ------------------------------------------------------------------------------------------

    def _factors(self, names: Sequence[str], scaling: dict[str, float] | None = None) -> list[Factor]:
        scaling = self.scaling if scaling is None else scaling
        return [Factor(self.lorad_A[name], self.lorad_B[name], scaling[name]) for name in names]

    def _pairing(self, names: Sequence[str]) -> str:
        """Return the pairing of adapters that rotate together. Raise `WadiError` if they differ: their angles do not add."""
        pairing, *others = dict.fromkeys(self.pairing[name] for name in names)
        if others:
            raise WadiError(
                f"LoRaD: adapters {', '.join(names)} have the pairings {pairing} and {others[0]}. Only adapters of one pairing "
                "can be active or merged together."
            )
        return pairing

    def _rotate(self, W: Tensor, names: Sequence[str], scaling: dict[str, float] | None = None) -> Tensor:
        theta = pair_angles(self._factors(names, scaling))
        return with_partners_together(lambda W: rotate(W, theta), W, self._pairing(names))

    def _live_weight(self) -> Tensor:
        """Return the base weight with its autograd history, dequantised if necessary."""
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())
        base: Any = self.get_base_layer()
        return base.weight

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return ``R - W`` for one adapter at its scale, with the shape and dtype of the current base weight ``W``."""
        W = self.get_base_weight()
        return self._rotate(W, [adapter_name]) - W

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rotated weight of the given (default: active) adapters into the base layer.

        Raises:
            WadiError: with ``safe_merge``, if the result is not finite. The base layer is then unchanged.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lorad_A]
        if not names:
            return
        R = self._rotate(self.get_base_weight(), names)
        if safe_merge and not torch.isfinite(R).all():
            raise WadiError(f"NaNs detected in the merged weights. The adapter {' + '.join(names)} seems to be broken")
        self.set_base_weight(R)
        self._merged_scaling.update({name: self.scaling[name] for name in names})
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Rotate the base weight back by the merged angles. This is exact up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        back = {name: -self._merged_scaling.pop(name) for name in self.merged_adapters}
        self.set_base_weight(self._rotate(self.get_base_weight(), list(back), back))
        self.merged_adapters.clear()

    # --- forward ------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, self.active_adapters, *args, **kwargs)

    def _adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Return the product with the weight rotated by ``adapters``, or the base layer's output if none rotates."""
        names = [name for name in adapters if name in self.lorad_A and self.scaling[name] != 0]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        W, bias, factors = self._live_weight(), self.bias, self._factors(names)
        if W.is_meta and not x.is_meta:
            raise WadiError(
                "LoRaD: the weight of this layer is offloaded (on the meta device), but LoRaD reads it in "
                "every forward pass. Merge the adapter before offloading, or offload whole models, not layers."
            )
        dtype = _product_dtype(x)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        x, conv = self._convolution(x)
        if any(self.recompute[name] for name in names) and torch.is_grad_enabled():
            return recomputed_product(x, W, bias, conv, factors)
        R = with_partners_together(lambda W: rotated_weight(W, factors, dtype), W, self._pairing(names))
        return product(x, R, bias, conv)

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Use adapter ``adapter_names[k]`` for sample ``k`` of the batch (``"__base__"``: no adapter)."""
        if self.merged:
            raise WadiError("LoRaD: `adapter_names` cannot be used with merged adapters. Call `unmerge_adapter` first.")
        if len(x) != len(adapter_names):
            raise WadiError(f"LoRaD: {len(adapter_names)} `adapter_names` for a batch of {len(x)}. Give one per sample.")
        result: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([k for k, other in enumerate(adapter_names) if other == name], device=x.device)
            part = self._adapted(x[rows], [name], *args, **kwargs)
            if result is None:
                result = part.new_empty((len(x), *part.shape[1:]))
            result[rows] = part
        return x.new_empty(0) if result is None else result


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes: autocast's if it applies, else the input's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class Linear(nn.Module, LoRaDLayer):
    """A linear layer ``x R^T + bias``, where ``R`` is the rotated base weight."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        config: LoRaDConfig,
        key: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoRaDLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config, key)

    def _features(self) -> tuple[int, int, int]:
        base: Any = self.get_base_layer()
        return base.in_features, base.out_features, base.in_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return LoRaDLayer.forward(self, x, *args, **kwargs)

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()


class Conv2d(Linear):
    """A convolution whose kernel, ``(out, in/groups, kh, kw)``, is rotated as a matrix ``(out, in/groups kh kw)``."""

    def _features(self) -> tuple[int, int, int]:
        base: Any = self.get_base_layer()
        return base.in_channels, base.out_channels, base.weight[0].numel()

    def _convolution(self, x: Tensor) -> tuple[Tensor, Convolution | None]:
        base: Any = self.get_base_layer()
        padding = base.padding
        if base.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return x, Convolution(base.stride, padding, base.dilation, base.groups)
