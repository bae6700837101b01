"""The file of a study: what it varies, its seeds, its evaluation and its budget. `read_study` checks the whole file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wadi.distill.config_files import from_dict
from wadi.errors import WadiError, short_repr
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, STEPS, UPDATES, Number, Whole
from wadi.io.yaml_files import read_yaml

MINUTES, FACTOR, SHARE = Number(0, 1e6, above=True), Number(0, 1e6, above=True), Number(0, 1, above=True)
SINGLE = ("fid", "kid", "fd", "kd", "fd-zoo", "top1", "clip", "hpsv2", "imagereward", "pickscore", "aesthetic")  # metrics
EVAL_BOUNDS: dict[str, Whole | Number] = {
    "count": COUNT, "set": Whole(0, 10**12), "size": Whole(1, 8192), "k": Whole(1, 10_000), "speed": Whole(0, 10_000),
    "teacher_steps": STEPS, "teacher_guidance_scale": GUIDANCE, "draw_batch": BATCH, "batch": BATCH,
}  # fmt: skip


@dataclass(frozen=True)
class EvalSettings:
    """Options of ``wadi eval``, the same for all runs. None = the default of the command.

    Args:
        protocol: zoo, coco2014-30k, coco2017-5k, or a file of prompts.
        metrics: names of metrics; empty = those of the protocol.
    """

    protocol: str = "zoo"
    count: int | None = None
    metrics: tuple[str, ...] = ()
    features: str | None = None
    reference: str | None = None
    set: int | None = None
    size: int | None = None
    k: int | None = None
    speed: int | None = None
    teacher_steps: int | None = None
    teacher_guidance_scale: float | None = None
    draw_batch: int | None = None
    batch: int | None = None
    weights: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Return the settings as words of the command line."""
        words = []
        for name, value in vars(self).items():
            flag = "--" + name.replace("_", "-")
            if name == "weights":
                words += [flag, *value] if value else []
            elif name == "metrics":
                words += [flag, ",".join(value)] if value else []
            elif value is not None:
                words += [flag, str(value)]
        return words


@dataclass(frozen=True)
class Budget:
    """The length of every run: ``steps``, or the ``minutes`` of training; both None = as the settings of each cell say."""

    steps: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Tune:
    """One setting of each cell is chosen by trials before its runs: trainings with a seed that is not reported.

    Args:
        setting: dotted name of a setting with a decimal number.
        factors: each cell's own value is multiplied by each of them, so all cells have the same number of trials; empty = no
            tuning.
        seed: training seed of the trials.
        metric: one of ``eval.metrics``; the value with the best result is chosen.
        share: length of a trial, as a share of a run's.
    """

    setting: str = "student.lr"
    factors: tuple[float, ...] = ()
    seed: int = 1000
    metric: str = "fd"
    share: float = 1.0


@dataclass(frozen=True)
class Study:
    """The contents of a study's file.

    Args:
        base: settings of all runs; ``preset`` names the preset to start from. Names may be dotted.
        grid: for each setting the list of its values; all combinations are cells.
        cells: settings of named cells; with ``grid``, each named cell is combined with each point of the grid.
        seeds: training seeds; every cell is trained with each of them.
        eval: options of ``wadi eval``.
        analysis: whether to compare each student's weights with the teacher's.
        swap: whether to evaluate each student with the teacher's norms or directions put back, too.
        budget: length of every run.
        tune: how to choose a setting of each cell.
        baseline: name of the cell that the report compares the others with; None = the first one.
    """

    base: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    eval: EvalSettings = field(default_factory=EvalSettings)
    analysis: bool = True
    swap: bool = False
    budget: Budget = field(default_factory=Budget)
    tune: Tune = field(default_factory=Tune)
    baseline: str | None = None


def read_study(path: Path) -> Study:
    """Return the study in a YAML file. Its cells are checked by `wadi.study.cells.expand`.

    Raises:
        WadiError: if the file cannot be read, has an unknown entry, a value of a wrong type or out of bounds, or no cells.
    """
    values = read_yaml(path, "Study")
    if not isinstance(values, dict):
        raise WadiError(f"Study {str(path)!r} is a {type(values).__name__}. It must be a mapping with base, grid and seeds.")
    try:
        return study_from(values)
    except WadiError as error:
        raise WadiError(f"Study {str(path)!r}: {error}") from error


def study_from(values: Mapping[str, Any]) -> Study:
    """Return a study from plain values.

    Raises:
        WadiError: see `read_study`.
    """
    study: Study = from_dict(values, Study)
    _check_seeds(study)
    _check_grid(study)
    _check_eval(study.eval)
    _check_tune(study)
    if study.swap and not study.analysis:
        raise WadiError("swap is true, but analysis is false. The hybrids are part of the analysis: set analysis: true.")
    if study.budget.steps is not None and study.budget.minutes is not None:
        raise WadiError(f"budget has both steps ({study.budget.steps}) and minutes ({study.budget.minutes}). Give one of them.")
    if study.budget.steps is not None:
        UPDATES.check("budget.steps", study.budget.steps)
    if study.budget.minutes is not None:
        MINUTES.check("budget.minutes", study.budget.minutes)
    return study


def _check_seeds(study: Study) -> None:
    if not study.seeds:
        raise WadiError("seeds is empty. List at least one training seed, such as [0, 1, 2].")
    for seed in study.seeds:
        Whole(0, 2**32 - 1).check("seeds", seed)
    if repeated := [seed for seed in dict.fromkeys(study.seeds) if study.seeds.count(seed) > 1]:
        raise WadiError(f"seeds contains {repeated[0]} twice. List each seed once.")


def _check_grid(study: Study) -> None:
    if not study.grid and not study.cells:
        raise WadiError("grid is empty, and there are no cells. Give a setting and its values, such as student.rank: [16, 32].")
    for name, values in study.grid.items():
        if not isinstance(values, list):
            raise WadiError(f"grid.{name} is {short_repr(values)}. It must be a list of values.")
        if not values:
            raise WadiError(f"grid.{name} is an empty list. Give at least one value, or leave out {name}.")
    for name, settings in study.cells.items():
        if not isinstance(settings, Mapping):
            raise WadiError(f"cells.{name} is {short_repr(settings)}. It must be a mapping of settings to values.")


def _check_tune(study: Study) -> None:
    tune = study.tune
    if not tune.factors:
        return
    for factor in tune.factors:
        FACTOR.check("tune.factors", factor)
    if len(set(tune.factors)) < max(2, len(tune.factors)):
        raise WadiError(f"tune.factors is {list(tune.factors)}. Give at least two different numbers, each once.")
    Whole(0, 2**32 - 1).check("tune.seed", tune.seed)
    SHARE.check("tune.share", tune.share)
    if tune.seed in study.seeds:
        raise WadiError(f"tune.seed is {tune.seed}, which is also under seeds. Results of a seed that chose settings flatter.")
    if study.eval.metrics and tune.metric not in study.eval.metrics:
        raise WadiError(f"tune.metric is {tune.metric!r}, but eval.metrics has {', '.join(study.eval.metrics)}. Add it there.")
    if tune.metric not in SINGLE:
        raise WadiError(f"tune.metric is {tune.metric!r}. Use one of {', '.join(SINGLE)}.")


def _check_eval(settings: EvalSettings) -> None:
    from wadi.evaluate.metric_table import METRICS
    from wadi.evaluate.protocols import COCO, NAMES

    for name, bounds in EVAL_BOUNDS.items():
        if (value := getattr(settings, name)) is not None:
            bounds.check(f"eval.{name}", value)
    if unknown := [name for name in settings.metrics if name not in METRICS]:
        raise WadiError(f"eval.metrics has {unknown[0]!r}, which does not exist. Use some of {', '.join(METRICS)}.")
    if settings.protocol not in NAMES and not Path(settings.protocol).is_file():
        raise WadiError(f"eval.protocol is {settings.protocol!r}. Use {', '.join(NAMES)}, or a file of prompts.")
    if settings.protocol in COCO and settings.reference is None:
        raise WadiError(f"eval.protocol {settings.protocol} needs eval.reference: a COCO folder with annotations/ in it.")
