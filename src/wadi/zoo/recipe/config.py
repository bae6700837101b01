"""Settings of the recipe that trains the embedded teacher."""

from __future__ import annotations

from dataclasses import dataclass

from wadi.errors import WadiError
from wadi.io.bounds import BATCH, RATE, SEED, THREADS, UPDATES, Number, Whole

MODELS = {"unet": "wadi.zoo.recipe.unet:UNetTeacher", "dit": "wadi.zoo.recipe.dit:DiTTeacher"}  # imported on use
STAGES = ("data", "autoencoder", "teacher", "classifier", "export")


@dataclass(frozen=True)
class ZooConfig:
    """Settings of the recipe. The shipped weights were made with the defaults.

    Args:
        out: folder of all files.
        model: teacher to train: 'unet' (zoo) or 'dit' (zoo-dit).
        stage: one stage of the recipe (data, autoencoder, teacher, classifier, export), or all of them in order.
        tarballs: folder of the npm tarballs; missing ones are downloaded into it; null = OUT/npm.
        weights: folder of the weights to ship; null = OUT/weights.
        seed: seed of initial weights, compositions and noise.
        device: device that trains the teacher, such as 'cpu' or 'cuda'; the other stages run on the CPU.
        threads: threads of torch; 0 = as torch chooses.
        minutes_autoencoder: training time of the autoencoder, in minutes.
        batch_autoencoder: images per step of the autoencoder.
        lr_autoencoder: learning rate of Muon for the autoencoder; parameters that Adam trains have 1e-3.
        minutes_teacher: training time of the teacher, in minutes; null = 67 for the U-Net, 240 for the DiT.
        batch_teacher: images per step of the teacher.
        lr_teacher: learning rate of Muon for the teacher; parameters that Adam trains have 2e-3.
        pool: latents kept ready for the teacher; new ones replace the oldest.
        first_fill: compositions of every sprite made before the teacher's training starts.
        fresh_per_step: compositions added at every step of the teacher.
        minutes_grid: minutes between image grids; each comes with a checkpoint.
        steps_classifier: training steps of the classifier.
    """

    out: str = "runs/zoo"
    model: str = "unet"
    stage: str = "all"
    tarballs: str | None = None
    weights: str | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 0

    minutes_autoencoder: float = 26.0
    batch_autoencoder: int = 8
    lr_autoencoder: float = 0.01

    minutes_teacher: float | None = None
    batch_teacher: int = 48
    lr_teacher: float = 0.01
    pool: int = 50_000
    first_fill: int = 16
    fresh_per_step: int = 6
    minutes_grid: float = 10.0

    steps_classifier: int = 1200

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise WadiError(f"There is no embedded teacher {self.model!r}. Set --model to one of {', '.join(MODELS)}.")
        if self.stage not in (*STAGES, "all"):
            raise WadiError(f"Stage {self.stage!r} does not exist. Use one of {', '.join(STAGES)}, or all.")
        for name in ("batch_autoencoder", "batch_teacher"):
            BATCH.check(name, getattr(self, name))
        for name in ("pool", "first_fill", "fresh_per_step", "steps_classifier"):
            UPDATES.check(name, getattr(self, name))
        for name in ("minutes_autoencoder", "minutes_teacher", "minutes_grid"):
            if getattr(self, name) is not None:
                Number(0, 1e6, above=True).check(name, getattr(self, name))
        for name in ("lr_autoencoder", "lr_teacher"):
            RATE.check(name, getattr(self, name))
        SEED.check("seed", self.seed)
        Whole(0, THREADS.high).check("threads", self.threads)
