"""Settings of a distillation run: frozen dataclasses that check their own values. No torch import.

A *step* is one update of the student. Timesteps count in the teacher's schedule, ``[0, T)``; angles are in radians.
``guidance_scale`` follows diffusers: ``uncond + w (cond - uncond)``, so 1 means no guidance.

Each entry under ``Args`` is also the help text of the option of that name. `config_files` reads, writes and compares settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wadi.errors import WadiError
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, RANK, RATE, SHARE, SIDE, STEPS, TIMESTEP, UPDATES, Number, Whole  # fmt: skip

Adapter = Literal["lorad", "lora", "dora", "dora-frozen", "oft", "boft", "hra", "road", "full"]


@dataclass(frozen=True)
class StudentConfig:
    """The student: an adapter of large rank that generates an image in one step, or in a few.

    Args:
        adapter: method of the student's adapter; 'lorad' rotates the directions of weights, 'full' trains all weights of the
            target layers, the others are PEFT's.
        adapter_options: further options of the adapter's PEFT config, such as '{"lora_alpha": 16}'.
        rank: rank of the student's adapter; null = the default of the method; methods without a rank ignore it.
        target_modules: regular expression for the names of the layers that the student adapts; null = the default of the
            model family.
        timesteps: timesteps at which the student generates, the noisiest first, one for each of its one to eight steps; empty =
            one step at the last timestep of the teacher's schedule.
        lr: learning rate of the student.
        ema: decay of the moving average of the student's adapter; the run then saves the average; 0 = no average.
    """

    adapter: Adapter = "lorad"
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    target_modules: str | None = None
    timesteps: tuple[int, ...] = ()
    lr: float = 1e-4
    ema: float = 0.0


@dataclass(frozen=True)
class FakeConfig:
    """The fake model: an adapter of small rank that learns to denoise the student's images.

    Args:
        adapter: method of the fake model's adapter, as for the student.
        adapter_options: further options of the adapter's PEFT config.
        rank: rank of the fake model's adapter; null = the default of the method; methods without a rank ignore it.
        target_modules: regular expression for the names of the layers that the fake model adapts; null = the default of the
            model family.
        lr: learning rate of the fake model.
        guidance_scale: guidance scale of the fake model in the student's loss; 1 = no guidance, which is faster; null = the
            default of the objective.
        updates: updates of the fake model per step; each uses the step's images with new noise and timesteps; null = the
            default of the objective.
        weighting: weighting of the denoising loss; 'alpha2' is the paper's ``(alpha_t eps_fake - alpha_t noise)^2``, 'none' is
            the plain squared error of the network's own prediction; null = the default of the objective.
        null_probability: share of the prompts that the fake model sees as the empty prompt, from 0 to 1.
    """

    adapter: Adapter = "lorad"
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    target_modules: str | None = None
    lr: float = 1e-2
    guidance_scale: float | None = None
    updates: int | None = None
    weighting: Literal["alpha2", "none"] | None = None
    null_probability: float = 0.1


@dataclass(frozen=True)
class WarmStartConfig:
    """The warm start: the student first learns the teacher's images by regression, from the same noise. Off by default.

    Args:
        pairs: number of pairs (noise, image of the teacher) to generate before training; 0 = no warm start.
        sampler_steps: steps of the teacher's deterministic sampler for each pair.
        guidance_scale: guidance scale of the teacher for the pairs.
        steps: steps of regression before distillation starts; they count as steps of the run.
        fake_steps: steps after the regression in which only the fake model learns; a fake model that does not know the
            student's new images would undo the warm start.
        weight: weight of the regression loss during distillation; above 0, half of each step's images come from the pairs.
    """

    pairs: int = 0
    sampler_steps: int = 12
    guidance_scale: float = 2.0
    steps: int = 0
    fake_steps: int = 0
    weight: float = 0.0


@dataclass(frozen=True)
class DistillConfig:
    """All settings of a distillation run. The same settings give the same run.

    Args:
        teacher: teacher to distil: a diffusers pipeline folder, a Hub id, or 'zoo' for the embedded teacher; append
            '?variant=fp16' to choose a variant of the weights.
        family: Python file that registers the family of the teacher's pipeline (docs/add-a-family.md); null = the families of
            the package and of installed packages.
        prompts: prompts to train on: a file (.txt, .jsonl, .csv, .parquet), a pattern of files ('data/*.jsonl'), a data set on
            the Hub ('hf://OWNER/NAME?split=train'), a folder written by `wadi embed`, or 'zoo' for the embedded teacher's
            captions.
        prompts_field: field that holds the prompt in files and data sets with several fields, dotted if nested; null = the
            first usual name that exists.
        out: folder of the run.
        steps: length of the run in steps; one step updates the student once.
        batch: images that each process evaluates at once.
        accumulate: batches per step on each process; a step uses ``batch * accumulate * processes`` images, and only this
            product affects the result.
        seed: seed of the initial adapters, the order of the prompts, the noise and the timesteps.
        resolution: height and width of the images in pixels; null = the model's own size.
        dtype: dtype of the frozen weights; adapters, optimizer states and the schedule are always float32.
        device: device to train on, such as 'cpu', 'cuda', 'cuda:1' or 'mps'; null = a GPU if there is one, else the CPU.
        objective: loss of the student; 'vsd' is the paper's, the others are 'dmd', 'dmd2', 'sid' and 'consistency'.
        objective_options: options of the objective, such as '{"gan_weight": 0.01}'.
        guidance_scale: guidance scale of the teacher in the student's loss.
        t_range: range of timesteps in the student's loss, as fractions of the schedule.
        lr_schedule: schedule of both learning rates; 'cosine' falls to a tenth at the end of the run.
        lr_warmup: steps in which both learning rates rise linearly at the start.
        betas: betas of AdamW.
        eps: eps of AdamW, added to the root of the second moment; gradients that are not much larger move more slowly.
        weight_decay: weight decay of AdamW.
        clip: largest gradient norm of the adapter of one role; longer gradients are scaled down to it.
        max_skipped: number of steps in a row with a non-finite gradient after which the run stops.
        gradient_checkpointing: recompute activations in the backward pass; takes less memory and about a third more time.
        recompute: recompute the rotated weights in the backward pass instead of keeping them; takes less memory and more time.
        shard: split the frozen weights over the processes (FSDP2) instead of keeping a copy on each.
        compile: compile the network with torch.compile.
        tf32: use TF32 for float32 matrix products on NVIDIA GPUs; faster, but inputs are rounded to 10 bits of mantissa.
        optimizer: optimizer of both adapters; 'adamw8bit' keeps AdamW's moments in 8 bits and needs bitsandbytes.
        sample_every: steps between sample grids; 0 = only at the start and at the end.
        sample_prompts: prompts of the sample grids; empty = the first 8 of the training prompts.
        sample_seeds: images per prompt for the diversity metric; the sample grids show the first two.
        teacher_steps: sampler steps of the teacher in the sample grids.
        teacher_guidance_scale: guidance scale of the teacher in the sample grids.
        checkpoint_every: steps between checkpoints; 0 = only at the end.
        keep_checkpoints: number of latest checkpoints to keep.
        keep_every: keep in addition each checkpoint whose step is a multiple of this number; 0 = none.
        tracker: accelerate tracker that receives the statistics besides stats.jsonl, such as 'tensorboard' or 'wandb'; null =
            none.
    """

    teacher: str = ""
    family: str | None = None
    prompts: str = ""
    prompts_field: str | None = None
    out: str = ""
    steps: int = 10_000
    batch: int = 16
    accumulate: int = 1
    seed: int = 0
    resolution: tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    objective: str = "vsd"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.5
    t_range: tuple[float, float] = (0.02, 0.98)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    max_skipped: int = 20
    gradient_checkpointing: bool = False
    recompute: bool = False
    shard: bool = False
    compile: bool = False
    tf32: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    sample_every: int = 500
    sample_prompts: tuple[str, ...] = ()
    sample_seeds: int = 4
    teacher_steps: int = 25
    teacher_guidance_scale: float = 3.0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0
    tracker: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)


WEIGHT = Number(0, 1e6)
BOUNDS: dict[str, Whole | Number] = {
    "student.rank": RANK, "student.lr": RATE, "student.ema": Number(0, 1),
    "fake.rank": RANK, "fake.lr": RATE, "fake.guidance_scale": GUIDANCE, "fake.updates": Whole(1, 10_000),
    "fake.null_probability": SHARE, "warm_start.pairs": Whole(0, COUNT.high), "warm_start.sampler_steps": STEPS,
    "warm_start.guidance_scale": GUIDANCE, "warm_start.steps": Whole(0, UPDATES.high),
    "warm_start.fake_steps": Whole(0, UPDATES.high), "warm_start.weight": WEIGHT, "steps": UPDATES, "batch": BATCH,
    "accumulate": BATCH, "seed": Whole(0, 2**32 - 1), "guidance_scale": GUIDANCE, "lr_warmup": Whole(0, UPDATES.high),
    "eps": Number(0, 1, above=True), "weight_decay": WEIGHT, "clip": Number(0, 1e30, above=True), "max_skipped": UPDATES,
    "sample_every": Whole(0, UPDATES.high), "sample_seeds": Whole(1, 4096), "teacher_steps": STEPS,
    "teacher_guidance_scale": GUIDANCE,
    "checkpoint_every": Whole(0, UPDATES.high), "keep_checkpoints": UPDATES, "keep_every": Whole(0, UPDATES.high),
}  # fmt: skip


def check_bounds(config: DistillConfig) -> None:
    """Check every number of ``config``.

    Raises:
        WadiError: names the first setting that is out of bounds, its value and its bounds.
    """
    for name, bounds in BOUNDS.items():
        group, _, key = name.rpartition(".")
        value = getattr(getattr(config, group) if group else config, key)
        if value is not None:
            bounds.check(name, value)
    for side in config.resolution or ():
        SIDE.check("resolution", side)
    for timestep in config.student.timesteps:
        Whole(1, TIMESTEP.high).check("student.timesteps", timestep)
    warm = config.warm_start
    rules = (
        ("student.ema", config.student.ema, config.student.ema < 1, "below 1"),
        ("t_range", config.t_range, 0 <= config.t_range[0] < config.t_range[1] <= 1, "0 <= low < high <= 1"),
        ("betas", config.betas, all(0 <= beta < 1 for beta in config.betas), "both in [0, 1)"),
        *(
            (f"warm_start.{name}", getattr(warm, name), warm.pairs > 0 or not getattr(warm, name), "0 without warm_start.pairs")
            for name in ("steps", "weight")  # fake_steps need no pairs: the fake model can learn before the student does
        ),
    )
    for name, value, holds, condition in rules:
        if not holds:
            raise WadiError(f"{name} is {value!r}. It must be {condition}: set --{name}.")
