"""Say how many runs a study has, and how long they take: from short runs that measure one step of each kind."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wadi.distill.config import DistillConfig
from wadi.distill.config_files import flat_settings, to_dict
from wadi.distill.run_folder import WARM_START, read_stats
from wadi.study.cells import Cell
from wadi.study.engines import Engine
from wadi.study.file import Study
from wadi.study.folder import TIMING
from wadi.study.jobs import Commands, Job, State, job_of

REFERENCE = "reference"  # name of an evaluation that generates the reference, too
STEPS = 3  # of each phase of a run; the first one is slower than the others and does not count
# Settings that do not change how long a step takes. Cells that differ in them alone share one measurement.
FREE = (
    "seed", "out", "steps", "student.lr", "fake.lr", "warm_start.pairs", "warm_start.steps", "warm_start.fake_steps",
    "lr_schedule", "lr_warmup", "betas", "eps", "weight_decay", "clip", "student.ema",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """The measurement of a cell.

    Attributes:
        step: seconds of a step of the warm start, of the fake model alone, and of both models; None if there is none.
        around: seconds of a run besides its steps and pairs: loading, image grids, saving.
        pair: seconds of a warm-start pair.
        after: seconds of each command that follows the training, as far as they were measured.
        error: why the short run failed; None = it did not.
    """

    step: tuple[float | None, float | None, float | None] = (None, None, None)
    around: float = 0.0
    pair: float = 0.0
    after: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def seconds(self, config: DistillConfig) -> float:
        """Return how long all steps of a run take."""
        steps = zip(_phases(config), self.step, strict=True)
        return sum(count * step for count, step in steps if step is not None)

    def steps_in(self, minutes: float, config: DistillConfig) -> int:
        """Return how many steps fit into ``minutes`` if the phases keep their shares; at least one."""
        return max(1, int(60 * minutes * config.steps / self.seconds(config)))


def measure(study: Study, cells: Sequence[Cell], folder: Path, engine: Engine) -> dict[str, Timing]:
    """Make the short runs that have not been made yet, and return the measurements by name of cell.

    The first one is followed by evaluation and analysis, whose durations count for all cells. An evaluation of other images
    comes before, so that the time to generate the reference is known by itself.

    Raises:
        WadiError: if the folder of the study cannot be written.
        Interrupted: see `wadi.study.engines.run_here`.
    """
    keys, jobs = {cell.name: _key(cell.config) for cell in cells}, dict[str, Job]()
    for cell in cells:
        if keys[cell.name] not in jobs:
            short, first = replace(cell, config=short_config(cell.config)), not jobs
            about = keys[cell.name] + (repr((study.eval, study.analysis, study.swap)) if first else "")
            name = hashlib.sha256(about.encode()).hexdigest()[:12] + TIMING
            job = job_of(study, folder, short, study.seeds[0], name, evaluated=first, analysed=first)
            jobs[keys[cell.name]] = replace(
                job, commands=_with_reference(study, job) if first else job.commands, share_pairs=False, keep_checkpoints=False
            )
    states = {job.name: state for job, state in engine([job for job in jobs.values() if not job.done()])}
    timings = {key: _timing(job, states.get(job.name) or job.state()) for key, job in jobs.items()}
    after = {name: seconds for timing in timings.values() for name, seconds in timing.after.items()}
    return {name: replace(timings[key], after=after) for name, key in keys.items()}


def _with_reference(study: Study, job: Job) -> Commands:
    """Return the commands of a job with an evaluation of another set of images before its own."""
    distill, (_, evaluation), *others = job.commands
    place = job.run / "eval" / "reference.json"
    words = (*evaluation, "--set", str((1 if study.eval.set is None else study.eval.set) + 1), "--out", str(place))
    return (distill, (REFERENCE, words), ("eval", evaluation), *others)


def short_config(config: DistillConfig) -> DistillConfig:
    """Return the settings of a short run: a few steps of each phase, few pairs, image grids at the start and the end only."""
    warm, fake, both = (min(count, STEPS) for count in _phases(config))
    pairs = min(config.warm_start.pairs, 2 * config.batch * config.accumulate)
    return replace(
        config, steps=warm + fake + both, warm_start=replace(config.warm_start, pairs=pairs, steps=warm, fake_steps=fake),
        sample_every=0, checkpoint_every=0, keep_every=0, tracker=None,
    )  # fmt: skip


def describe(jobs: Iterable[Job], timings: Mapping[str, Timing], cell_of: Mapping[str, str], workers: int = 1) -> str:
    """Return the plan as text: a line for each cell, then the sum. A finished run counts as nothing.

    Args:
        jobs: all trainings of the study.
        timings: by name of cell.
        cell_of: the cell of each job, by their names.
        workers: number of runs at once, as in the measurement.
    """
    jobs, names, total = list(jobs), list(dict.fromkeys(cell_of.values())), 0.0
    pairs, lines, left = dict[Path, float](), list[tuple[str, str]](), [job for job in jobs if not job.done()]
    for name in names:
        own, timing = [job for job in left if cell_of[job.name] == name], timings[name]
        if timing.error is not None:
            lines.append((name, f"{len(own):3} runs  cannot run: {timing.error}"))
            continue
        seconds = [_seconds(job, timing) for job in own]
        pairs |= {job.shared_pairs: timing.pair * job.config.warm_start.pairs for job in own if job.shared_pairs is not None}
        total += sum(seconds)
        each = f"  {statistics.fmean(seconds) / 60:6.1f} min each" if seconds else ""
        lines.append((name, f"{len(own):3} runs{each}"))
    made = sum(seconds for file, seconds in pairs.items() if not file.exists())
    measured = max((timing.after for timing in timings.values()), key=len)
    reference = max(0.0, measured.get(REFERENCE, 0.0) - measured.get("eval", 0.0)) if len(left) == len(jobs) else 0.0
    width = max(len(name) for name in names)
    at_once = f", {workers} at once" if workers > 1 else ""
    count = sum(timings[cell_of[job.name]].error is None for job in left)
    return "\n".join(
        [f"{name:<{width}}  {text}" for name, text in lines]
        + ([f"pairs of warm starts, shared by cells  {made / 60:6.1f} min"] if made else [])
        + ([f"images of the reference  {reference / 60:6.1f} min"] if reference else [])
        + [f"{count} runs, about {(total + made + reference) / 3600 / workers:.2f} hours{at_once}."]
    )


def _phases(config: DistillConfig) -> tuple[int, int, int]:
    """Return the number of steps of the warm start, of the fake model alone, and of both models."""
    warm = min(config.warm_start.steps, config.steps)
    fake = min(config.warm_start.fake_steps, config.steps - warm)
    return warm, fake, config.steps - warm - fake


def _key(config: DistillConfig) -> str:
    cost = {name: value for name, value in flat_settings(to_dict(config)).items() if name not in FREE}
    return json.dumps([cost, [bool(count) for count in _phases(config)], bool(config.warm_start.pairs)], sort_keys=True)


def _seconds(job: Job, timing: Timing) -> float:
    after = sum(timing.after.get(name, 0.0) for name, _ in job.commands)
    return timing.seconds(job.config) + timing.around + after


def _timing(job: Job, state: State) -> Timing:
    if state.failed is not None or "distill" not in state.seconds:
        return Timing(error=f"{state.failed}: {state.error}")
    steps = [line["seconds"] for line in read_stats(job.run / "stats.jsonl")]
    durations = [after - before for before, after in zip([0.0, *steps], steps, strict=False)]
    step, start = list[float | None](), 0
    for count in _phases(job.config):
        own = durations[start : start + count]
        step.append(statistics.fmean(own[1:] or own) if own else None)
        start += count
    pairs, making = job.config.warm_start.pairs, 0.0
    if pairs:  # they are made right after the settings are written
        making = (job.run / WARM_START).stat().st_mtime - (job.run / "config.yaml").stat().st_mtime
    around = max(0.0, state.seconds["distill"] - steps[-1] - making)
    after = {name: seconds for name, seconds in state.seconds.items() if name != "distill"}
    return Timing((step[0], step[1], step[2]), around, making / pairs if pairs else 0.0, after)
