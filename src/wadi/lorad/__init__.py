"""LoRaD, Low-rank Rotation of weight Direction, as a PEFT method (type ``LORAD``).

Importing this package registers the method. ``peft.get_peft_model(model, LoRaDConfig(...))``,
``model.add_adapter(LoRaDConfig(...))`` of diffusers and transformers, ``PeftModel.from_pretrained`` and the
rest of PEFT then work as for PEFT's own methods. This package knows nothing about diffusion.

Start with `rotation.py`, the mathematics. `layer.py` puts it into Linear and Conv2d layers, `model.py` into whole models.
"""

from wadi.lorad.config import LoRaDConfig
from wadi.lorad.layer import LoRaDLayer
from wadi.lorad.model import LoRaDModel
from wadi.lorad.registry import register
from wadi.lorad.rotation import pair_angles, rotate, rotated_weight

register(LoRaDConfig, LoRaDModel)

__all__ = [
    "LoRaDConfig",
    "LoRaDLayer",
    "LoRaDModel",
    "pair_angles",
    "rotate",
    "rotated_weight",
]
