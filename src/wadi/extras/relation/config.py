"""Settings of learning a token for a relation."""

from __future__ import annotations

from dataclasses import dataclass

from wadi.extras.relation.loss import PREPOSITIONS
from wadi.io import bounds

_LIMITS: dict[str, bounds.Whole | bounds.Number] = {
    "steps": bounds.UPDATES, "batch": bounds.BATCH, "positives": bounds.COUNT, "save_every": bounds.UPDATES, "lr": bounds.RATE,
    "temperature": bounds.Number(0, 1000, above=True), "alpha": bounds.SHARE, "steer": bounds.Number(0, 1000),
    "seed": bounds.SEED,
}  # fmt: skip


@dataclass(frozen=True)
class RelationConfig:
    """Settings of the training; the defaults are ReVersion's.

    Args:
        steps: updates of the embedding.
        batch: exemplars per update.
        lr: learning rate of Adam.
        alpha: preference for noisy timesteps, from 0 (none) to 1 (strongest).
        steer: weight of the steering loss; 0 turns it off.
        temperature: ``gamma`` of the steering loss.
        positives: number of prepositions that each update pulls the token to.
        words: prepositions to choose them from.
        seed: seed of the noise, the timesteps and the order of the exemplars.
        save_every: updates between two saved states, from which an interrupted training continues.
    Raises:
        WadiError: if a value is out of range.
    """

    steps: int = 3000
    batch: int = 8
    lr: float = 2e-3
    alpha: float = 0.5
    steer: float = 0.01
    temperature: float = 0.07
    positives: int = 4
    words: tuple[str, ...] = PREPOSITIONS
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))
