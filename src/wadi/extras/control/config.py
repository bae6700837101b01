"""Settings of a ControlNet's training."""

from __future__ import annotations

from dataclasses import dataclass

from wadi.errors import WadiError

COUNTS = {"pictures": 1_000_000, "picture_steps": 1000, "steps": 10_000_000, "batch": 65_536, "save_every": 10_000_000}
LARGEST_WEIGHT = 1000.0
SEEDS = 2**40  # a generator's seed is a million times this seed plus the step, which must stay below 2^63


@dataclass(frozen=True)
class ControlConfig:
    """Settings of a training. The shipped ControlNet of the embedded teacher was trained with the defaults.

    Args:
        out: folder of the training; the same command continues an interrupted one.
        pictures: number of training images, which the teacher generates once.
        picture_steps: steps of the teacher's sampler for the training images.
        guidance_scale: guidance with which the teacher generates the training images.
        steps: updates in total.
        batch: images per update.
        lr: learning rate of AdamW; it rises for 30 steps and then falls to 0 as a cosine.
        drop: share of prompts replaced by the empty one, so that guidance works; not used with a student.
        picture_weight: with a student, weight of the squared error of its latents; a large one blurs.
        edge_weight: with a student, weight of the difference between edges.
        keep_weight: with a student, weight of the change of the ControlNet's residuals.
        slim: train a ControlNet without attention and text (`wadi.extras.control.network`).
        seed: seed of the images, noise and timesteps.
        save_every: updates between checkpoints.
    """

    out: str = "runs/control"
    pictures: int = 1024
    picture_steps: int = 10
    guidance_scale: float = 2.5
    steps: int = 900
    batch: int = 16
    lr: float = 1e-3
    drop: float = 0.1
    picture_weight: float = 1.0
    edge_weight: float = 2.0
    keep_weight: float = 0.0
    slim: bool = True
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, largest in COUNTS.items():
            if not 1 <= getattr(self, name) <= largest:
                raise WadiError(f"{name} is {getattr(self, name)}. Give a whole number from 1 to {largest:,}.")
        for name in ("picture_weight", "edge_weight", "keep_weight", "guidance_scale"):
            if not 0 <= getattr(self, name) <= LARGEST_WEIGHT:
                raise WadiError(f"{name} is {getattr(self, name)}. Give a number from 0 to {LARGEST_WEIGHT:g}.")
        if not 0 < self.lr <= 1:
            raise WadiError(f"lr is {self.lr}. Give a number above 0 and at most 1.")
        if not 0 <= self.drop <= 1:
            raise WadiError(f"drop is {self.drop}. Give a number from 0 to 1.")
        if not 0 <= self.seed < SEEDS:
            raise WadiError(f"seed is {self.seed}. Give a whole number from 0 to {SEEDS - 1:,}.")
