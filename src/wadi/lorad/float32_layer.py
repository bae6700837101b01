"""What the layers of this project's own methods share: float32 parameters on a network of any dtype, and scales.

PEFT's base class would cast an adapter to the dtype of the layer below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from wadi.errors import WadiError

_HALF = (torch.float16, torch.bfloat16)


class Float32Parameters(nn.ParameterDict):
    """Parameters by adapter name that stay float32 when the model around them is cast to half precision.

    Their updates are too small for half precision. So ``model.half()`` and ``pipe.to(dtype)`` move the
    parameters but do not round them, and parameters from half-precision files are converted to float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Parameters:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            rounded = moved.dtype in _HALF and tensor.dtype not in _HALF
            return tensor.to(moved.device, torch.float32) if rounded else moved

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.dtype in _HALF:
                state_dict[prefix + name] = saved.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Float32Layer(BaseTunerLayer):
    """A PEFT layer whose parameters are `Float32Parameters`, with a scale by adapter name in ``scaling``.

    What a scale multiplies is up to the method. 0 must give exactly the base layer.
    """

    scaling: dict[str, float]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for attribute in self.adapter_layer_names:
            parameters = getattr(self, attribute)
            if device is not None and adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name] = parameters[adapter_name].to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Give ``adapter`` the scale ``scale``. 0 gives exactly the base layer, 1 the adapter."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by ``scale``."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo ``scale_layer(scale)``; without ``scale``, set every active adapter's scale to 1."""
        if scale == 0:
            raise WadiError("A scale of 0 cannot be undone by division. Use set_scale(adapter, 1.0).")
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale
