"""Settings of a ControlNet's training."""

from __future__ import annotations

from dataclasses import dataclass

from wadi.io import bounds

_LIMITS: dict[str, bounds.Whole | bounds.Number] = {
    "pictures": bounds.Whole(1, 1_000_000), "picture_steps": bounds.STEPS, "steps": bounds.Whole(1, 10_000_000),
    "batch": bounds.BATCH, "save_every": bounds.Whole(1, 10_000_000), "picture_weight": bounds.Number(0, 1000),
    "edge_weight": bounds.Number(0, 1000), "keep_weight": bounds.Number(0, 1000), "guidance_scale": bounds.Number(0, 1000),
    "lr": bounds.Number(0, 1, above=True), "drop": bounds.SHARE,
    "seed": bounds.Whole(0, 2**40 - 1),  # a generator's seed is a million times this seed plus the step, below 2^63
}  # fmt: skip


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
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))
