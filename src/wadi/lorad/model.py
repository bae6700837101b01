"""LoRaD on a whole model: which layers can be rotated, and how adapters are added and combined."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from wadi.errors import WadiError
from wadi.lorad.config import LoRaDConfig
from wadi.lorad.layer import Conv2d, Linear, LoRaDLayer
from wadi.lorad.targets import why_no_plain_weight

try:  # dequantises layers of bitsandbytes, HQQ and torchao; new in PEFT 0.21
    from peft.utils import get_quantization_kwargs, resolve_quantization_backend
except ImportError:  # pragma: no cover
    get_quantization_kwargs = resolve_quantization_backend = None  # type: ignore[assignment]


class LoRaDModel(BaseTuner):
    """PEFT's tuner for LoRaD: it replaces the targeted layers of a model by rotated ones.

    Usually created by ``peft.get_peft_model(model, LoRaDConfig(...))``.
    """

    prefix: str = "lorad_"
    tuner_layer_cls = LoRaDLayer
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
        config: LoRaDConfig = peft_config
        ranks = config.rank_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), current_key), config.r)
        if isinstance(target, LoRaDLayer):
            target.update_layer(adapter_name, r, config, current_key)
            return
        backend = _quantization_backend(self.model, target, current_key)
        layer_class = _layer_class(target, backend, current_key)
        layer = layer_class(target, adapter_name, r, config, current_key, quantization_backend=backend)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until set_adapter activates it
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep angles in float32. Only an explicit ``autocast_adapter_dtype=False`` stores them in the base layer's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        layers = [m for m in self.model.modules() if isinstance(m, LoRaDLayer) and adapter_name in m.lorad_A]
        for layer in layers:
            layer.store_like_base(adapter_name)
        if any(layer.lorad_A[adapter_name].dtype != torch.float32 for layer in layers):
            warnings.warn(
                "LoRaD: autocast_adapter_dtype=False stores angles in the base model's precision. The computation "
                "still uses float32, but training in half precision loses small updates.",
                stacklevel=2,
            )

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter whose angles are ``sum weight_k scale_k theta_k``. This is exact; the ranks add up.

        Raises:
            WadiError: if a name is unknown or already used, the lists have different lengths, ``combination_type``
                is not ``"cat"``, or the settings of the adapters cannot be combined.
        """
        config, ranks = self._joint_config(adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.delete_adapter(adapter_name)  # some layers may have it already
            raise
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoRaDLayer) and name in ranks:
                parts = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.lorad_A]
                scaled = [layer.lorad_A[a] * (w * layer.scaling[a]) for a, w in parts]
                layer.lorad_A[adapter_name].copy_(torch.cat(scaled, 1))
                layer.lorad_B[adapter_name].copy_(torch.cat([layer.lorad_B[a] for a, _ in parts]))
        self.set_requires_grad(adapter_name, False)

    def _joint_config(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
    ) -> tuple[LoRaDConfig, dict[str, int]]:
        """Return the config of the combined adapter, and its rank by full layer name."""
        unknown = [a for a in adapters if a not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights) or adapter_name in self.peft_config:
            raise WadiError(
                f"LoRaD: add_weighted_adapter received adapters {adapters}, weights {weights} and the new name "
                f"{adapter_name!r}. Give one weight per adapter, adapters from {sorted(self.peft_config)}, and a "
                "name that is not in use."
            )
        if combination_type != "cat":
            raise WadiError(f"LoRaD: combination_type is {combination_type!r}. Use 'cat', which adds angles exactly.")
        configs: list[Any] = [self.peft_config[a] for a in adapters]
        ranks = {
            name: sum(layer.r[a] for a in adapters if a in layer.r)
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoRaDLayer) and any(a in layer.r for a in adapters)
        }
        (usual, _), *_rest = Counter(ranks.values()).most_common(1)
        # PEFT also matches the end of a name; with ^, ``proj_out`` does not match ``blocks.0.proj_out``
        pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != usual}
        joint = replace(
            configs[0],
            r=usual,
            rank_pattern=pattern,
            target_modules=_joint_targets(configs),
            modules_to_save=None,
            bias="none",
            excess_rank="allow",
        )
        return joint, ranks

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass ``adapter_names`` (one per sample of the batch) to every rotated layer within the block."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise WadiError("LoRaD: `adapter_names` works only in inference. Call `eval()` first.")
        layers = [m for m in self.modules() if isinstance(m, LoRaDLayer)]
        known = {name for layer in layers for name in layer.lorad_A} | {"__base__"}
        if unknown := sorted(set(adapter_names) - known):
            raise WadiError(f"LoRaD: non-existing adapter(s) {', '.join(unknown)}. Known are {', '.join(sorted(known))}.")
        hook = partial(_with_adapter_names, adapter_names=adapter_names)
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_adapter_names(_layer: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _joint_targets(configs: list[Any]) -> set[str] | str:
    """Return targets that match every layer that any of ``configs`` matches."""
    selection = [(c.exclude_modules, c.layers_to_transform, c.layers_pattern, c.pairing) for c in configs]
    kinds = {type(c.target_modules) for c in configs}
    if any(s != selection[0] for s in selection) or len(kinds) != 1:
        raise WadiError(
            "LoRaD: add_weighted_adapter needs adapters that agree in exclude_modules, layers_to_transform, "
            "layers_pattern, pairing and in the kind of target_modules (lists, or regular expressions)."
        )
    if kinds == {str}:
        return "|".join(f"({c.target_modules})" for c in configs)
    return set().union(*(c.target_modules for c in configs))


def _quantization_backend(model: nn.Module, target: nn.Module, key: str) -> Any:
    """Return PEFT's access to a quantised layer's weight, or None for a plain layer.

    Raises:
        WadiError: if the layer's weight cannot be dequantised.
    """
    if resolve_quantization_backend is None:
        return None
    backend = resolve_quantization_backend(target, **get_quantization_kwargs(model))
    if backend is None or type(backend).__name__ != "ForwardOnlyQuantizationBackend":
        return backend
    raise WadiError(
        f"LoRaD: {key} is quantised by {backend.backend_name}, which cannot dequantise its weight. LoRaD rotates "
        "the weight itself. Use bitsandbytes, HQQ, torchao or no quantisation, or exclude the layer."
    )


def _layer_class(target: nn.Module, backend: Any, key: str) -> type[Linear]:
    """Return the LoRaD class for ``target``.

    Raises:
        WadiError: if LoRaD cannot rotate it. The message says why.
    """
    why = _why_not(target, backend)
    if why:
        raise WadiError(
            f"LoRaD: cannot rotate {key} ({type(target).__name__}): {why}. Name other target_modules, "
            "or name it in exclude_modules."
        )
    return Conv2d if isinstance(target, nn.Conv2d) else Linear


def _why_not(target: nn.Module, backend: Any) -> str:
    """Return why LoRaD cannot rotate ``target``; empty if it can."""
    if isinstance(target, BaseTunerLayer):
        return (
            "it already has an adapter of another method, which LoRaD would ignore; merge and unload "
            "that adapter first, or add it after LoRaD"
        )
    if backend is not None:
        return "" if backend.layer_type == "linear" else "only linear layers are supported when quantised"
    if why := why_no_plain_weight(target):
        return why
    weight: Any = target.weight
    fan_in = weight[0].numel()
    return "" if fan_in > 1 else f"its fan-in is {fan_in}, but a rotation needs pairs of inputs"
