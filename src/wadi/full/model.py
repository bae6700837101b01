"""The method on a whole model: which layers can be trained."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from wadi.errors import WadiError
from wadi.full.layer import Conv2d, FullLayer, Linear
from wadi.lorad.targets import why_no_plain_weight


class FullModel(BaseTuner):
    """PEFT's tuner for whole weights: it puts a trained difference on the targeted layers of a model."""

    prefix: str = "full_"
    tuner_layer_cls = FullLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, FullLayer):
            target.update_layer(adapter_name, peft_config)
            return
        plain = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if why := why_no_plain_weight(plain):
            raise WadiError(
                f"Adapter 'full' cannot train {current_key} ({type(plain).__name__}): {why}. Name other target_modules, or "
                "name it in exclude_modules."
            )
        layer = (Conv2d if isinstance(plain, nn.Conv2d) else Linear)(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until set_adapter activates it
        self._replace_module(parent, target_name, layer, target)
