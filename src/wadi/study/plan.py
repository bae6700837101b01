"""Say how many runs a study has, and how long they take, from finished runs or from short ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wadi.study.cells import Cell
from wadi.study.jobs import Job
from wadi.study.trials import Trial


@dataclass(frozen=True)
class CellPlan:
    """The remaining runs of a cell.

    Attributes:
        seconds: of one run with evaluation and analysis; None if its trial failed.
        source: what ``seconds`` was measured on.
        pairs: number of warm-start pairs that ``seconds`` leaves out.
        error: of the trial.
    """

    name: str
    runs: int
    left: int
    seconds: float | None
    source: str
    pairs: int = 0
    error: str | None = None


def plan_study(runs: Sequence[tuple[Cell, int, Job]], trials: Mapping[str, Trial]) -> list[CellPlan]:
    """Return the plan of each cell. Finished runs count before trials."""
    after = min((trial.after for trial in trials.values() if trial.after is not None), default=0.0)
    plans = []
    for cell in {cell.name: cell for cell, _, _ in runs}.values():
        jobs = [job for of, _, job in runs if of.name == cell.name]
        finished = [sum(job.state().seconds.values()) for job in jobs if job.done()]
        left, trial = len(jobs) - len(finished), trials.get(cell.name)
        if finished:
            plans.append(CellPlan(cell.name, len(jobs), left, statistics.fmean(finished), "finished runs"))
        elif trial is None or trial.step is None:
            error = None if trial is None else f"{trial.state.failed}: {trial.state.error}"
            plans.append(CellPlan(cell.name, len(jobs), left, None, "no measurement", error=error))
        else:
            seconds = trial.step * cell.config.steps + trial.around + after
            plans.append(CellPlan(cell.name, len(jobs), left, seconds, "a short run", cell.config.warm_start.pairs))
    return plans


def describe(plans: Sequence[CellPlan], workers: int = 1) -> str:
    """Return the plan as text: a line for each cell, then the sum.

    Args:
        workers: number of runs at once, which is assumed not to slow them down.
    """
    width = max(len(plan.name) for plan in plans)
    lines = []
    for plan in plans:
        time = "cannot run" if plan.error else "unknown" if plan.seconds is None else f"{plan.seconds / 60:8.1f} min each"
        reason = f": {plan.error}" if plan.error else f" ({plan.source})"
        lines.append(f"{plan.name:<{width}}  {plan.left:3} of {plan.runs} runs left  {time}{reason}")
    left = sum(plan.left for plan in plans if plan.seconds is not None)
    hours = sum(plan.left * plan.seconds for plan in plans if plan.seconds is not None) / 3600 / workers
    at_once = f", {workers} at once" if workers > 1 else ""
    lines.append(f"{left} runs, about {hours:.2f} hours{at_once}.")
    if any(plan.pairs for plan in plans if plan.left):
        lines.append("The time to generate the pairs of a warm start is not included until a run of the cell has finished.")
    return "\n".join(lines)
