"""Settings of a DreamBooth training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from wadi.errors import WadiError
from wadi.io import bounds

Method = Literal["lorad", "lora", "full"]
Loss = Literal["diffusion", "one-step"]  # see wadi.extras.dreambooth.losses

_LIMITS: dict[str, bounds.Whole | bounds.Number] = {
    "rank": bounds.RANK, "steps": bounds.UPDATES, "batch": bounds.BATCH, "lr": bounds.RATE,
    "prior_weight": bounds.Number(0, 1000), "seed": bounds.SEED,
}  # fmt: skip


@dataclass(frozen=True)
class DreamboothConfig:
    """Settings of a training.

    Args:
        method: train a LoRaD adapter, a LoRA, or the full weights.
        rank: rank of the adapter.
        target_modules: regular expression that matches whole names of layers; None = the layers that students of the model's
            family adapt.
        lr: learning rate at the start; it falls along a cosine to a tenth.
        steps: number of updates.
        batch: images of the subject per update, and as many of the class.
        prior_weight: weight of the loss on the class; unused without a prior.
        loss: see `wadi.extras.dreambooth.losses`.
        seed: seed of the initial weights, the noise and the order of the images.
    Raises:
        WadiError: if a value is out of range.
    """

    method: Method = "lorad"
    rank: int = 16
    target_modules: str | None = None
    lr: float = 1e-3
    steps: int = 200
    batch: int = 4
    prior_weight: float = 1.0
    loss: Loss = "diffusion"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("method", get_args(Method)), ("loss", get_args(Loss))):
            if getattr(self, name) not in choices:
                raise WadiError(f"{name} is {getattr(self, name)!r}. Choose one of {', '.join(choices)}.")
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))
