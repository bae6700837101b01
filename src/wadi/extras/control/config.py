"""Settings of a ControlNet's training."""

from __future__ import annotations

from dataclasses import dataclass

from wadi.errors import WadiError

COUNTS = {"pictures": 1_000_000, "picture_steps": 1000, "steps": 10_000_000, "batch": 65_536, "save_every": 10_000_000}
LARGEST_WEIGHT = 1000.0
SEEDS = 2**40  # a generator's seed is a million times this seed plus the step, which must stay below 2^63


@dataclass(frozen=True)
class ControlConfig:
    """Settings of a training. The shipped ControlNet of the embedded teacher was trained with the defaults."""

    out: str = "runs/control"  # folder; the same command continues an interrupted training
    pictures: int = 1024  # training images, generated once by the teacher
    picture_steps: int = 10  # steps of the teacher's sampler
    guidance_scale: float = 2.5  # with which the teacher generates the training images
    steps: int = 900  # updates in total
    batch: int = 16  # images per update
    lr: float = 1e-3  # learning rate of AdamW; rises for 30 steps, then falls to 0 as a cosine
    drop: float = 0.1  # share of prompts replaced by the empty one, so that guidance works; not used with a student
    picture_weight: float = 1.0  # with a student: weight of the squared error of its latents, which blurs
    edge_weight: float = 2.0  # with a student: weight of the difference between edges
    keep_weight: float = 0.0  # with a student: weight of the change of the ControlNet's residuals
    slim: bool = True  # a ControlNet without attention and text, see `wadi.extras.control.network`
    seed: int = 0
    save_every: int = 100  # updates between checkpoints

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
