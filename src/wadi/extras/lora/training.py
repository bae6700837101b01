"""Attach a new LoRA to a network for training, and write it as diffusers does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from wadi.backbones import from_pipeline
from wadi.errors import WadiError, first_line
from wadi.extras.lora import ADAPTER_NAME
from wadi.io.patterns import matching_names


def attach_lora(network: nn.Module, rank: int, target_modules: str) -> list[nn.Parameter]:
    """Freeze ``network`` and attach a LoRA. Return its parameters, in float32.

    ``alpha`` is the rank. ``B`` is zero, so the output does not change.

    Args:
        target_modules: regular expression that matches the whole names of the layers.
    Raises:
        WadiError: if no layer matches, or matching takes too long.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    names = matching_names(target_modules, [name for name, _ in network.named_modules() if name], "target_modules")
    exact = "|".join(map(re.escape, names)) or r"(?!)"  # PEFT would match without a limit of time
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exact), network, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise WadiError(
            f"The LoRA could not be attached: {first_line(error)}. target_modules is {target_modules!r:.300}. Give a regular "
            "expression that matches whole names of Linear or Conv2d layers."
        ) from error
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


def write_lora(pipeline: Any, folder: Path) -> None:
    """Write the LoRA that `attach_lora` attached to the pipeline's network; ``load_lora_weights(folder)`` reads it.

    Raises:
        WadiError: if diffusers has no LoRA format for the pipeline's family.
    """
    from peft import get_peft_model_state_dict

    component = from_pipeline(pipeline).component
    if not hasattr(pipeline, "save_lora_weights"):
        raise WadiError(f"diffusers has no LoRA format for {type(pipeline).__name__}. Use --method lorad or full.")
    tensors = get_peft_model_state_dict(getattr(pipeline, component), adapter_name=ADAPTER_NAME)
    layers = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    type(pipeline).save_lora_weights(folder, **{f"{component}_lora_layers": layers})
