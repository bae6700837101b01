"""Settings of a distillation run: frozen dataclasses, presets, YAML in and out. No torch import.

A *step* is one update of the student. Timesteps are the schedule's own, in ``[0, T)``; angles are in radians; learning rates
are AdamW's. ``guidance_scale`` is diffusers' convention: ``uncond + w (cond - uncond)``, so 1 means no guidance.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wadi.errors import WadiError, short_repr
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, RANK, RATE, SHARE, SIDE, STEPS, TIMESTEP, UPDATES, Number, Whole  # fmt: skip
from wadi.io.records import flatten
from wadi.io.yaml_files import read_yaml


@dataclass(frozen=True)
class StudentConfig:
    """The one-step generator: a LoRaD adapter of large rank.

    Args:
        rank: rank of the angles ``Theta = A @ B``.
        target_modules: regular expression over module names of the layers that get angles; null = the family's default.
        timestep: the timestep ``t*`` at which the student is asked; null = the last of the schedule, ``T - 1``.
        lr: learning rate.
        weighting: of the distillation gradient; 'sigma2' is the paper's ``sigma_t^2 (eps_real - eps_fake)``, 'dmd' divides
            the distance of the two predicted images by the mean absolute error of the teacher's (DMD, eq. 8).
        ema: decay of the exponential moving average of the angles, which is then what is saved; 0 = none.
    """

    rank: int = 256
    target_modules: str | None = None
    timestep: int | None = None
    lr: float = 1e-4
    weighting: Literal["sigma2", "dmd"] = "sigma2"
    ema: float = 0.0


@dataclass(frozen=True)
class FakeConfig:
    """The fake model: a LoRaD adapter of small rank that learns to denoise the student's images.

    Args:
        rank: rank of the angles.
        target_modules: regular expression over module names; null = the family's default.
        lr: learning rate.
        guidance_scale: guidance of the fake model in the distillation gradient; 1 = none (and one pass less).
        updates: updates of the fake model per step, each on the step's images with fresh noise and timesteps.
        weighting: of the denoising loss; 'alpha2' is the paper's ``(alpha_t eps_fake - alpha_t noise)^2``, 'none' is the
            plain error of the network's own prediction.
        null_probability: share of the prompts that are replaced by the null prompt.
    """

    rank: int = 32
    target_modules: str | None = None
    lr: float = 1e-2
    guidance_scale: float = 1.5
    updates: int = 1
    weighting: Literal["alpha2", "none"] = "alpha2"
    null_probability: float = 0.1


@dataclass(frozen=True)
class WarmStartConfig:
    """Before distillation the student may regress on the teacher's own few-step samples from the same noise. Off by default.

    Args:
        pairs: number of (noise, teacher's sample) pairs made at the start; 0 = no warm start.
        sampler_steps: steps of the teacher's deterministic sampler per pair.
        guidance_scale: guidance of those samples.
        steps: regression steps before distillation begins, counted within the run's ``steps``.
        fake_steps: steps after those in which only the fake model learns, on the warmed student's images: a cold fake model
            would undo the start.
        weight: weight at which the regression loss is kept beside the distillation loss afterwards.
    """

    pairs: int = 0
    sampler_steps: int = 12
    guidance_scale: float = 2.0
    steps: int = 0
    fake_steps: int = 0
    weight: float = 0.0


@dataclass(frozen=True)
class DistillConfig:
    """Everything a run can be repeated from.

    Args:
        teacher: diffusers pipeline folder, Hub id, or 'zoo' for the embedded teacher; '?variant=fp16' behind it chooses a copy
            of the weights.
        prompts: file of prompts (.txt, .jsonl, .csv, .parquet), a pattern of such ('data/*.jsonl'), a data set by name
            ('hf://OWNER/NAME?split=train'), a folder that `wadi embed` wrote, or 'zoo' for the embedded teacher's captions.
        prompts_field: of files and data sets with fields, the one that holds the prompt (dotted if nested); null = the first of
            the usual ones that is there.
        out: folder of the run.
        steps: length of the run in updates of the student.
        batch: images that a process evaluates at once.
        accumulate: batches per step and process: a step has batch x accumulate x processes images, on which alone its result
            depends.
        seed: of initial angles, prompts, noise and timesteps.
        resolution: height and width of the images in pixels; null = the model's own.
        dtype: of the frozen weights; angles, their optimisers and the schedule are float32 always.
        device: 'cpu', 'cuda', 'cuda:1', 'mps', ...; null = a GPU if there is one, else the CPU.
        guidance_scale: guidance of the teacher in the distillation gradient.
        t_range: timesteps of the distillation gradient, as fractions of ``T``.
        lr_schedule: of both learning rates; 'cosine' falls to a tenth, after ``lr_warmup`` steps of linear rise.
        lr_warmup: see ``lr_schedule``.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip: largest norm of the gradient of all angles of a role.
        max_skipped: the run stops after this many steps in a row with a non-finite gradient.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        recompute: rebuild rotated weights in the backward pass instead of keeping them.
        shard: spread the frozen weights over the processes (FSDP2) instead of holding them whole on each.
        compile: run the network through torch.compile.
        tf32: let matrix products on NVIDIA GPUs round their float32 inputs to 10 bits of mantissa.
        optimizer: 'adamw8bit' keeps AdamW's moments in 8 bits (bitsandbytes).
        sample_every: steps between sample grids; 0 = at start and end only.
        sample_prompts: prompts of the grids; empty = the first of the prompts file.
        sample_seeds: images per prompt in the grids, and in the measure of diversity.
        teacher_steps: steps of the teacher's sampler in the grids.
        teacher_guidance_scale: guidance of the teacher in the grids.
        checkpoint_every: steps between checkpoints; 0 = at the end only.
        keep_checkpoints: how many to keep.
        keep_every: checkpoints of steps that this divides are kept beside those; 0 = none.
        tracker: an accelerate tracker to report to beside stats.jsonl ('tensorboard', 'wandb', ...); null = none.
    """

    teacher: str = ""
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
    guidance_scale: float = 1.5
    t_range: tuple[float, float] = (0.02, 0.98)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
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
        _check(self)


# Settings that may differ when a run is resumed: none of them enters the mathematics. (``recompute`` is not among them: its
# backward pass is a product of its own, which float16 rounds otherwise.)
# Of batch and accumulate their product with the number of processes does; the checkpoint holds it. Nor does the length of a run
# whose learning rate is constant: it may be lengthened.
BOOKKEEPING = frozenset(
    {"out", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_every", "tracker", "device", "batch", "accumulate",
     "shard", "gradient_checkpointing"}
)  # fmt: skip


WEIGHT = Number(0, 1e6)
BOUNDS: dict[str, Whole | Number] = {
    "student.rank": RANK, "student.timestep": Whole(1, TIMESTEP.high), "student.lr": RATE, "student.ema": Number(0, 1),
    "fake.rank": RANK, "fake.lr": RATE, "fake.guidance_scale": GUIDANCE, "fake.updates": Whole(1, 10_000),
    "fake.null_probability": SHARE, "warm_start.pairs": Whole(0, COUNT.high), "warm_start.sampler_steps": STEPS,
    "warm_start.guidance_scale": GUIDANCE, "warm_start.steps": Whole(0, UPDATES.high),
    "warm_start.fake_steps": Whole(0, UPDATES.high), "warm_start.weight": WEIGHT, "steps": UPDATES, "batch": BATCH,
    "accumulate": BATCH, "seed": Whole(0, 2**32 - 1), "guidance_scale": GUIDANCE, "lr_warmup": Whole(0, UPDATES.high),
    "weight_decay": WEIGHT, "clip": Number(0, 1e30, above=True), "max_skipped": UPDATES, "sample_every": Whole(0, UPDATES.high),
    "sample_seeds": Whole(1, 4096), "teacher_steps": STEPS, "teacher_guidance_scale": GUIDANCE,
    "checkpoint_every": Whole(0, UPDATES.high), "keep_checkpoints": UPDATES, "keep_every": Whole(0, UPDATES.high),
}  # fmt: skip


PATHS = ("teacher", "prompts", "out")
SOURCES = frozenset({"teacher", "prompts", "prompts_field"})  # their digests are in every checkpoint


def _check(config: DistillConfig) -> None:
    """Bounds of all numbers; one `WadiError` that names the first that is out of them."""
    values = flatten(to_dict(config))
    for name, bounds in BOUNDS.items():
        if values[name] is not None:
            bounds.check(name, values[name])
    for side in config.resolution or ():
        SIDE.check("resolution", side)
    warm = config.warm_start
    rules = (
        ("student.ema", config.student.ema, config.student.ema < 1, "below 1"),
        ("t_range", config.t_range, 0 <= config.t_range[0] < config.t_range[1] <= 1, "0 <= low < high <= 1"),
        ("betas", config.betas, all(0 <= beta < 1 for beta in config.betas), "both in [0, 1)"),
        *(
            (f"warm_start.{name}", getattr(warm, name), warm.pairs > 0 or not getattr(warm, name), "0 without warm_start.pairs")
            for name in ("steps", "weight")  # fake_steps do without: a fake model that learns before the student does
        ),
    )
    for name, value, holds, expected in rules:
        if not holds:
            raise WadiError(f"{name} is {value!r}. Expected {expected}: set --{name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries, lists and scalars, as YAML and JSON hold them."""
    plain: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        plain[entry.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(values: Mapping[str, Any], cls: Any = DistillConfig, prefix: str = "") -> Any:
    """A config from nested dictionaries; what is left out takes its default.

    Raises:
        WadiError: on an unknown key (the nearest known one is named), a value of another type or out of bounds.
    """
    return _build(typed(values, cls, prefix), cls)


def _build(values: Mapping[str, Any], cls: Any) -> Any:
    hints = get_type_hints(cls)
    return cls(**{k: _build(v, hints[k]) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def typed(values: Mapping[str, Any], cls: Any = DistillConfig, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with some of the settings, each as its type; ``~`` in a path becomes the home folder.

    Raises:
        WadiError: on an unknown key (the nearest known one is named) or a value of another type.
    """
    hints = get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        key = str(key)  # YAML's may be numbers
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise WadiError(
                f"Unknown setting {prefix + key[:100]!r}. Expected one of {', '.join(sorted(hints))}."
                + (f" Did you mean {prefix + near[0]!r}?" if near else "")
            )
        arguments[key] = _convert(value, hints[key], prefix + key)
        if prefix + key in PATHS and arguments[key].startswith("~"):
            arguments[key] = os.path.expanduser(arguments[key])
    return arguments


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as read from YAML to the annotated type; numbers widen from int to float, lists become tuples."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return typed(value, hint, name + ".")
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value in options:
            return value
    elif get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(inner) == len(value):
            return tuple(_convert(v, h, f"{name}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))
    elif type(None) in options:  # X | None
        return None if value is None else _convert(value, options[0], name)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # a string is what YAML 1.1 makes of 1e-4, which lacks a point
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise WadiError(f"{name} is {short_repr(value)}. Expected {expected}: correct it in the configuration.")


def save(config: DistillConfig, path: Path) -> None:
    """Write the resolved config as YAML, whole or not at all."""
    import yaml

    from wadi.io.files import write_whole

    write_whole(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def load(path: Path) -> DistillConfig:
    """Read a config written by `save`, or any YAML/JSON file with some of the settings.

    Raises:
        WadiError: if the file cannot be read, is no YAML mapping, or holds an unknown, ill-typed or unbounded setting.
    """
    values = read_settings(path)
    warm = values.get("warm_start", {})
    if not warm.get("pairs"):
        warm.pop("weight", None)  # earlier versions allowed one, which had no effect
    try:
        config: DistillConfig = _build(values, DistillConfig)
    except WadiError as error:
        raise WadiError(f"Config {str(path)!r}: {error}") from error
    return config


def read_settings(path: Path, group: str | None = None) -> dict[str, Any]:
    """Read some of the settings from a YAML or JSON file, as nested dictionaries; bounds are not checked.

    Args:
        group: name of the settings that the file alone contains, such as ``student``; None = it names the groups.
    Raises:
        WadiError: if the file cannot be read, is no YAML mapping, or holds an unknown or ill-typed setting.
    """
    values = read_yaml(path, "Config")
    if not isinstance(values, dict):
        raise WadiError(f"Config {str(path)!r} holds {type(values).__name__}. Expected a mapping of settings.")
    try:
        return typed(values if group is None else {group: values})
    except WadiError as error:
        raise WadiError(f"Config {str(path)!r}: {error}") from error


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one; where both have a value, that of ``second``."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], Mapping) and isinstance(second[name], Mapping):
            both[name] = merged(first[name], second[name])
    return both


def differences(old: DistillConfig, new: DistillConfig, sources: bool = True) -> list[str]:
    """Settings in which two configs differ and that matter to a run's result, as ``name: old -> new`` lines.

    Args:
        sources: whether the names of teacher and prompts count. They do not where their contents are compared instead: folders
            may have moved. Two spellings of one path never count.
    """
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    free = BOOKKEEPING | ({"steps"} if old.lr_schedule == new.lr_schedule == "constant" else set())
    free |= set() if sources else SOURCES
    return [
        f"{k}: {before[k]!r} -> {after[k]!r}"
        for k in after
        if k not in free and before[k] != after[k] and not (k in PATHS and _same_place(before[k], after[k]))
    ]


def _same_place(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or a Hub id
        return False
