"""Run a study, or continue it: short runs if the budget needs them, then all runs, then the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wadi.study.cells import Cell, expand, with_length
from wadi.study.collect import RunRow, collect
from wadi.study.engines import Engine
from wadi.study.file import Study
from wadi.study.folder import locked, open_folder
from wadi.study.jobs import Job, State, job_of, run_name
from wadi.study.plan import CellPlan, plan_study
from wadi.study.report import write_results
from wadi.study.trials import Trial, measure, steps_in

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """The runs of a study, and the failures of those that have no length because their short run failed."""

    runs: list[tuple[Cell, int, Job]]
    trials: dict[str, Trial]
    failures: dict[str, State]


def run_study(study: Study, folder: Path, engine: Engine, title: str, say: Say = print) -> list[RunRow]:
    """Run everything that has not finished, write the results, and return a row for each run.

    A run that fails does not stop the others; the next call tries it again.

    Args:
        engine: runs jobs, here or on a cluster.
        title: of the results.
        say: receives a line after each run.
    Raises:
        WadiError: on bad input, or if the folder cannot be written.
        Interrupted: on SIGINT, SIGTERM or SIGHUP; the results so far are written.
    """
    cells = expand(study)
    open_folder(folder, study, cells)
    with locked(folder):
        ready = prepare(study, cells, folder, engine, trials=study.budget.minutes is not None)
        failures = dict(ready.failures)
        left = [job for _, _, job in ready.runs if not job.done() and job.name not in failures]
        say(f"{len(ready.runs)} runs of {len(cells)} cells, {len(left)} left.")
        try:
            for number, (job, state) in enumerate(engine(left), 1):
                say(f"{number} of {len(left)}  {job.name}: {_outcome(job, state)}")
                if state.failed == "cluster":
                    failures[job.name] = state
        finally:
            rows = collect(ready.runs, failures)
            write_results(rows, folder, title, study.baseline)
    return rows


def plan(study: Study, folder: Path, engine: Engine) -> list[CellPlan]:
    """Return how long the remaining runs take. Runs a short training of each cell that was not measured before.

    Raises:
        WadiError: see `run_study`.
    """
    cells = expand(study)
    open_folder(folder, study, cells)
    with locked(folder):
        ready = prepare(study, cells, folder, engine, trials=True)
        return plan_study(ready.runs, ready.trials)


def prepare(study: Study, cells: Sequence[Cell], folder: Path, engine: Engine, trials: bool) -> Prepared:
    """Return the runs of a study with their lengths; write their settings files.

    Args:
        trials: whether to measure the cells first.
    """
    measured = measure(study, cells, folder, engine) if trials else {}
    runs, failures = [], {}
    for cell in cells:
        trial = measured.get(cell.name)
        if study.budget.minutes is not None and trial is not None and trial.step is not None:
            cell = replace(cell, config=with_length(cell.config, steps_in(study.budget.minutes, trial.step)))
        for seed in study.seeds:
            job = job_of(folder, cell, seed, study.eval, study.analysis)
            runs.append((cell, seed, job))
            if study.budget.minutes is not None and trial is not None and trial.step is None:
                failures[run_name(cell, seed)] = trial.state
    return Prepared(runs, measured, failures)


def _outcome(job: Job, state: State) -> str:
    if state.interrupted:
        return f"stopped during {state.failed}"
    if state.failed:
        return f"{state.failed} failed: {state.error} Log: {job.folder / 'logs' / (job.name + '.log')}"
    return f"done in {sum(state.seconds.values()) / 60:.1f} min"
