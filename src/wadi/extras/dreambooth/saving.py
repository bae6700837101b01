"""Write a trained subject in its standard format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wadi import roles
from wadi.backbones import Backbone
from wadi.backbones.saving import write_pipeline
from wadi.extras.dreambooth.config import Method
from wadi.extras.lora import ADAPTER_NAME
from wadi.extras.lora.training import write_lora
from wadi.io.files import whole_folder


def save_subject(pipeline: Any, backbone: Backbone, method: Method, folder: Path, about: dict[str, Any]) -> None:
    """Write the trained weights to a new ``folder``, completely or not at all, and ``about`` as ``wadi.json``.

    LoRaD gives a PEFT adapter folder, LoRA a ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``, and full weights a
    pipeline folder.

    Raises:
        WadiError: if diffusers has no LoRA format for the pipeline's family, or the folder cannot be written.
    """
    with whole_folder(folder) as temporary:
        if method == "lorad":
            roles.write(backbone.network, ADAPTER_NAME, temporary)
        elif method == "lora":
            write_lora(pipeline, temporary)
        else:
            write_pipeline(pipeline, temporary)
        (temporary / "wadi.json").write_text(json.dumps(about, indent=2) + "\n")
