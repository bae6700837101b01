"""Run a study, or continue it: short runs if the budget needs them, trials if a setting is tuned, all runs, then the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from wadi.study.cells import Cell, expand, with_length
from wadi.study.collect import RunRow, collect
from wadi.study.engines import Engine
from wadi.study.file import Study
from wadi.study.folder import opened
from wadi.study.jobs import Job, State, job_of, run_name
from wadi.study.plan import Timing, describe, measure
from wadi.study.report import write_results
from wadi.study.tune import Choice, all_trials, choose, read_choice, tuned

Say = Callable[[str], None]


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
    cells, failures = expand(study), dict[str, State]()
    with opened(folder, study, cells):
        if study.budget.minutes is not None:
            timings = measure(study, cells, folder, engine)
            failures |= {name: State(failed="short run", error=of.error) for name, of in timings.items() if of.error}
            cells = of_equal_time(study, cells, timings)
        trials = [job for cell, job in all_trials(study, cells, folder) if cell.name not in failures]
        states = _run(trials, engine, f"trials of {study.tune.setting}", say)
        choices = _choices(study, cells, folder, states) if study.tune.factors else {}
        failures |= {name: State(failed="trials", error=of.error) for name, of in choices.items() if of.chosen is None}
        cells = [tuned(cell, choices[cell.name]) if cell.name in choices else cell for cell in cells]
        runs = all_runs(study, cells, folder)
        ends = {job.name: failures[cell.name] for cell, _, job in runs if cell.name in failures}
        try:
            states = _run([job for _, _, job in runs if job.name not in ends], engine, "runs", say)
            ends |= {name: state for name, state in states.items() if state.failed == "cluster"}
        finally:
            rows = collect(runs, ends)
            write_results(rows, folder, title, study.baseline, choices)
    return rows


def plan(study: Study, folder: Path, engine: Engine, workers: int = 1) -> str:
    """Return how many runs are left and how long they take. Measures each cell that was not measured before.

    Raises:
        WadiError: see `run_study`.
    """
    cells = expand(study)
    with opened(folder, study, cells):
        timings = measure(study, cells, folder, engine)
        cells = of_equal_time(study, cells, timings)
        jobs = [*all_trials(study, cells, folder), *((cell, job) for cell, _, job in all_runs(study, cells, folder))]
        return describe([job for _, job in jobs], timings, {job.name: cell.name for cell, job in jobs}, workers)


def all_runs(study: Study, cells: Sequence[Cell], folder: Path) -> list[tuple[Cell, int, Job]]:
    """Return the runs of all cells and seeds."""
    return [(cell, seed, job_of(study, folder, cell, seed, run_name(cell, seed))) for cell in cells for seed in study.seeds]


def of_equal_time(study: Study, cells: Sequence[Cell], timings: dict[str, Timing]) -> list[Cell]:
    """Return the cells with as many steps as fit into the minutes of the budget, if it has any."""
    minutes = study.budget.minutes
    if minutes is None:
        return list(cells)
    return [
        cell
        if (of := timings[cell.name]).error is not None
        else replace(cell, config=with_length(cell.config, of.steps_in(minutes, cell.config)))
        for cell in cells
    ]


def _choices(study: Study, cells: Sequence[Cell], folder: Path, states: dict[str, State]) -> dict[str, Choice]:
    return {cell.name: read_choice(cell, folder) or choose(study, cell, folder, states) for cell in cells}


def _run(jobs: Sequence[Job], engine: Engine, what: str, say: Say) -> dict[str, State]:
    """Run the jobs that are not done, and return their states by name."""
    left, states = [job for job in jobs if not job.done()], dict[str, State]()
    if jobs:
        say(f"{len(jobs)} {what}, {len(left)} left.")
    for number, (job, state) in enumerate(engine(left), 1):
        states[job.name] = state
        say(f"{number} of {len(left)}  {job.name}: {_outcome(job, state)}")
    return states


def _outcome(job: Job, state: State) -> str:
    if state.interrupted:
        return f"stopped during {state.failed}"
    if state.failed:
        return f"{state.failed} failed: {state.error} Log: {job.log}"
    return f"done in {sum(state.seconds.values()) / 60:.1f} min"
