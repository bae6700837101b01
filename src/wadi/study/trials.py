"""Short runs that measure how long a step of each cell takes: for budgets in minutes, and for the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wadi.distill.config import DistillConfig
from wadi.distill.run_folder import read_stats
from wadi.study.cells import Cell, with_length
from wadi.study.engines import Engine
from wadi.study.file import Study
from wadi.study.jobs import Job, State, job_of

TRIAL_STEPS = 12
EVALUATED = 2  # cells whose trial is evaluated: the first one also generates the reference, so the faster of two counts


@dataclass(frozen=True)
class Trial:
    """The measurement of one cell.

    Attributes:
        step: seconds of a training step; None if the trial failed.
        around: seconds of a run besides its steps: loading, image grids, saving.
        after: seconds of evaluation and analysis; None if they were not measured for this cell.
        state: of the trial's job; names the error if it failed.
    """

    step: float | None
    around: float
    after: float | None
    state: State


def measure(study: Study, cells: Sequence[Cell], folder: Path, engine: Engine) -> dict[str, Trial]:
    """Run the trials that have not been run yet, and return the measurements by name of cell.

    Raises:
        WadiError: if the folder of the study cannot be written.
        Interrupted: see `wadi.study.engines.run_here`.
    """
    jobs = {cell.name: _job(study, cell, folder, index < EVALUATED) for index, cell in enumerate(cells)}
    states = {job.name: state for job, state in engine([job for job in jobs.values() if not job.done()])}
    return {name: _trial(job, states.get(job.name) or job.state()) for name, job in jobs.items()}


def trial_config(config: DistillConfig) -> DistillConfig:
    """Return the settings of a short run. The phases of a warm start keep their shares; it has few pairs and no image grids."""
    short = with_length(config, min(config.steps, TRIAL_STEPS))
    pairs = min(config.warm_start.pairs, 2 * config.batch * config.accumulate)
    return replace(
        short, warm_start=replace(short.warm_start, pairs=pairs), sample_every=0, checkpoint_every=0, keep_every=0,
        sample_seeds=1, teacher_steps=1, sample_prompts=short.sample_prompts[:1], tracker=None,
    )  # fmt: skip


def steps_in(minutes: float, step: float) -> int:
    """Return how many steps of ``step`` seconds fit into ``minutes``; at least one."""
    return max(1, int(60 * minutes / step))


def _job(study: Study, cell: Cell, folder: Path, evaluated: bool) -> Job:
    short = replace(cell, config=trial_config(cell.config))
    evaluation = study.eval if evaluated else None
    return job_of(folder, short, study.seeds[0], evaluation, evaluated and study.analysis, f"{cell.name}--trial")


def _trial(job: Job, state: State) -> Trial:
    if "distill" not in state.seconds:
        return Trial(None, 0.0, None, state)
    seconds = [line["seconds"] for line in read_stats(job.folder / "runs" / job.name / "stats.jsonl")]
    # the first step is slower than the others: it fills caches
    step = (seconds[-1] - seconds[0]) / (len(seconds) - 1) if len(seconds) > 1 else seconds[0]
    after = [seconds for name, seconds in state.seconds.items() if name != "distill"]
    return Trial(step, max(0.0, state.seconds["distill"] - seconds[-1]), sum(after) if after else None, state)
