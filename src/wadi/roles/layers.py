"""Attach adapters of any PEFT method to a network, switch between them, and fuse one into the weights.

Every quirk of PEFT and diffusers that this needs is handled here. One of them would go unnoticed elsewhere: PEFT's own
``set_adapter`` freezes the adapter that it leaves, so a backward pass after it gives no gradient.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wadi.errors import WadiError, first_line
from wadi.io.patterns import matching_names
from wadi.lorad.stored import PEFT_PREFIX

if TYPE_CHECKING:
    from peft import PeftConfig


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, layer)`` of every layer that carries an adapter of any kind.

    Where adapters of two methods share a layer, PEFT puts one layer around the other: ``to_q`` and ``to_q.base_layer``.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def refuse_adapted(model: nn.Module) -> None:
    """Raise `WadiError` if ``model`` already carries an adapter of any kind."""
    for name, _ in adapter_layers(model):
        raise WadiError(
            f"The teacher already carries an adapter (at {name}). It must have plain weights. Merge the adapter "
            "(pipeline.fuse_lora() and pipeline.unload_lora_weights()), save the pipeline, and use that folder."
        )


def attach(model: nn.Module, name: str, config: PeftConfig, frozen: Collection[str] = ()) -> list[str]:
    """Freeze ``model`` and add the adapter ``name`` to every layer that ``config.target_modules`` matches.

    The adapter's parameters are float32 (float64 in a float64 model), also where ``model`` has half precision. The model's
    output does not change, as PEFT's methods start from zero. Adapters attached before keep their state: their parameters that
    are trained, and those that are not, stay so.

    Args:
        config: of any PEFT method that adapts layers: ``LoRaDConfig``, ``LoraConfig``, ``OFTConfig``, ...
        frozen: attributes of a layer that hold parameters which are not trained, such as ``lora_magnitude_vector``.
    Returns:
        Names of the adapted layers.
    Raises:
        WadiError: if the name is taken, no layer matches, or the method cannot adapt one of the layers.
    """
    from peft import inject_adapter_in_model

    if name in getattr(model, "peft_config", {}):
        raise WadiError(f"An adapter named {name!r} is already attached. Choose another name.")
    trained_before = [
        parameter for adapter in attached(model) for parameter in parameters(model, adapter).values() if parameter.requires_grad
    ]
    model.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are intended
            inject_adapter_in_model(_with_exact_names(config, model), model, adapter_name=name)
    except WadiError:
        raise
    except (ValueError, re.error) as error:
        raise WadiError(
            f"Adapter {name!r} could not be attached: {first_line(error)}. target_modules must match Linear or Conv2d "
            "layers (a string is a regular expression for whole names; see print(network)), and options must fit their sizes."
        ) from error
    for _, layer in adapter_layers(model):
        layer.requires_grad_(False)
    _refuse_oft_on_kernels(model, name, config)
    configs: Any = model.peft_config
    configs[name] = config  # the original has the patterns, and is what adapter_config.json stores
    for parameter in parameters(model, name).values():
        if parameter.dtype in (torch.float16, torch.bfloat16):  # some methods copy the base layer's dtype
            parameter.data = parameter.data.float()
    _set_norms(model, name)
    for parameter in trained_before:  # injecting an adapter froze those that were there before
        parameter.requires_grad_(True)
    for _, layer in adapter_layers(model):
        for key, parameter in parameters_of(layer, name):
            parameter.requires_grad_(key.split(".")[0] not in frozen)
    return adapted_layers(model, name)


def _set_norms(model: nn.Module, name: str) -> None:
    """Set DoRA's magnitudes to the norms of the base weights in float32. PEFT rounds them to half precision first."""
    for _, layer in adapter_layers(model):
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        if name in magnitudes:
            magnitude, W = magnitudes[name].weight, layer.get_base_layer().weight
            if W.dtype in (torch.float16, torch.bfloat16):
                magnitude.data = W.detach().float().flatten(1).norm(dim=1).view(magnitude.shape)


def _refuse_oft_on_kernels(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Raise `WadiError` if OFT is on a kernel larger than 1x1. PEFT would add up overlapping patches."""
    from peft import PeftType

    for layer_name in adapted_layers(model, name) if config.peft_type == PeftType.OFT else ():
        layer: Any = model.get_submodule(layer_name)
        kernel = getattr(layer.get_base_layer(), "kernel_size", (1, 1))
        if tuple(kernel) != (1, 1):
            raise WadiError(
                f"Adapter {name!r} is of type OFT, which PEFT does not compute correctly for kernels larger than 1x1. Layer "
                f"{layer_name} has {kernel[0]}x{kernel[1]}. Name it in exclude_modules, or choose another adapter."
            )


def _with_exact_names(config: PeftConfig, model: nn.Module) -> Any:
    """Return a copy of ``config`` that lists the layers its regular expressions match.

    PEFT would match the expressions itself, without a time limit, and an expression in a file can be made to run for ever.
    """
    names = [name for name, _ in model.named_modules() if name]
    exact: Any = copy.copy(config)
    for setting in ("target_modules", "exclude_modules"):
        pattern = getattr(config, setting, None)
        if isinstance(pattern, str) and pattern != "all-linear":
            matches = matching_names(pattern, names, setting)
            if not matches and setting == "target_modules":
                raise WadiError(
                    f"target_modules is {pattern!r:.300}, which matches none of the {len(names)} layers. A regular expression "
                    "must match the whole name of a Linear or Conv2d layer: see print(network)."
                )
            setattr(exact, setting, "|".join(map(re.escape, matches)) if matches else None)
            names = matches if setting == "target_modules" else sorted(set(names) - set(matches))
    for setting in ("rank_pattern", "alpha_pattern"):
        if patterns := getattr(config, setting, None):
            values: dict[str, int] = {}
            for pattern, value in reversed(patterns.items()):  # if several match a layer, the first counts
                values |= dict.fromkeys(matching_names(rf"(.*\.)?({pattern})", names, setting), value)
            setattr(exact, setting, {re.escape(name): value for name, value in values.items()})
    return exact


def parameters_of(layer: Any, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that one layer has for adapter ``name``, under the names that PEFT's files use."""
    for attribute in layer.adapter_layer_names:
        by_adapter = getattr(layer, attribute, {})
        if name not in by_adapter:
            continue
        value = by_adapter[name]
        if isinstance(value, nn.Parameter):
            yield attribute, value
        elif isinstance(value, nn.Module):
            yield from ((f"{attribute}.{inner}", parameter) for inner, parameter in value.named_parameters())


def _has_adapter(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of adapter ``name`` in the model's order, such as ``mid_block.to_q.lorad_A``."""
    return {
        f"{plain_name(layer_name)}.{key}": parameter
        for layer_name, layer in adapter_layers(model)
        for key, parameter in parameters_of(layer, name)
    }


def trained_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return those of `parameters` that training changes."""
    return {key: parameter for key, parameter in parameters(model, name).items() if parameter.requires_grad}


def state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of adapter ``name`` under the names of an adapter file. They share the parameters' memory."""
    return {PEFT_PREFIX + key: value.detach() for key, value in parameters(model, name).items()}


def attached(model: nn.Module) -> list[str]:
    """Return the names of the attached adapters, in the order in which they were attached."""
    return list(getattr(model, "peft_config", {}))


def adapted_layers(model: nn.Module, name: str) -> list[str]:
    """Return the names of the layers that adapter ``name`` adapts, in the model's order."""
    return [plain_name(layer_name) for layer_name, layer in adapter_layers(model) if any(parameters_of(layer, name))]


def plain_name(name: str) -> str:
    """Return the name that a layer or tensor has in the model without adapters."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers without any adapter's, under the names that the plain model gives them."""
    of_adapters = tuple(
        f"{name}.{attribute}." if name else f"{attribute}."
        for name, layer in adapter_layers(model)
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names)
    )
    return {
        plain_name(name): value
        for name, value in model.state_dict().items()
        if not (of_adapters and name.startswith(of_adapters))
    }


@contextmanager
def active(model: nn.Module, role: str | None) -> Iterator[None]:
    """Within the block ``model`` computes in ``role``: the name of an adapter, or None for the teacher.

    Nothing else changes: no ``requires_grad``, no weight. ``backward()`` may run inside or outside of the block.

    Raises:
        WadiError: if no layer carries the adapter ``role``; the model would silently compute as the teacher.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    if role is not None and not any(True for layer in layers for _ in parameters_of(layer, role)):
        raise WadiError(f"There is no adapter {role!r}. This model has {_names(model)}: attach it first.")
    with activated(layers, [[role] if role else []] * len(layers)):
        yield


@contextmanager
def activated(layers: Sequence[Any], names: Sequence[Any]) -> Iterator[None]:
    """Within the block each layer applies the adapters ``names[i]``. PEFT's setter would also change ``requires_grad``.

    A layer without any of them is disabled, so it calls the layer that it is around. HRA would otherwise use the weight of the
    innermost layer, past an adapter of another method.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer, active_adapters in zip(layers, names, strict=True):
        layer._active_adapter = active_adapters
        layer._disable_adapters = not any(_has_adapter(layer, name) for name in layer.active_adapters)
    try:
        yield
    finally:
        for layer, (active_adapters, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active_adapters, disabled


def active_names(layers: Sequence[Any]) -> list[Any]:
    """Return the active adapters of each layer."""
    return [layer._active_adapter for layer in layers]


def fuse(model: nn.Module, name: str) -> nn.Module:
    """Merge adapter ``name`` into the weights and remove every adapter. The result is a plain model.

    Raises:
        WadiError: if no layer carries ``name``.
    """
    if not adapted_layers(model, name):
        raise WadiError(f"There is no adapter {name!r} to fuse. This model has {_names(model)}.")
    layers = list(adapter_layers(model))
    for _, layer in layers:
        if any(parameters_of(layer, name)):
            layer.merge(adapter_names=[name])
    for layer_name, layer in layers:
        if layer_name == plain_name(layer_name):  # the outer layer, where there are two
            parent, _, child = layer_name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _names(model: nn.Module) -> str:
    return ", ".join(repr(name) for name in getattr(model, "peft_config", {})) or "no adapter"
