"""Attach a new LoRA to a network for training, and write it as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from wadi import roles
from wadi.backbones import from_pipeline
from wadi.errors import WadiError
from wadi.extras.lora import ADAPTER_NAME


def attach_lora(network: nn.Module, rank: int, target_modules: str) -> list[nn.Parameter]:
    """Freeze ``network`` and attach a LoRA. Return its parameters, in float32.

    ``alpha`` is the rank. ``B`` is zero, so the output does not change.

    Args:
        target_modules: regular expression that matches the whole names of the layers.
    Raises:
        WadiError: if no layer matches, or matching takes too long.
    """
    from peft import LoraConfig

    roles.attach(network, ADAPTER_NAME, LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules))
    return list(roles.parameters(network, ADAPTER_NAME).values())


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
