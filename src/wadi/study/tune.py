"""Choose one setting of each cell by trials: trainings with a seed that no result uses, the same number for each cell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from wadi.errors import WadiError
from wadi.evaluate.result import read_result
from wadi.io.files import write_whole
from wadi.io.metric_names import lower_is_better
from wadi.io.records import Finite, Record, asdict, read_json
from wadi.study.cells import Cell, value_of, with_length, with_value
from wadi.study.file import Study
from wadi.study.jobs import RESULT, Job, State, job_of


class Choice(Record):
    """The choice for one cell, in ``state/CELL--tuned.json``: once made, it is not made again.

    Attributes:
        setting: its dotted name.
        values: those that were tried, in rising order.
        scores: the metric that each reached; None for a trial that failed.
        chosen: the value with the best score; None if all trials failed.
        error: of the last failed trial.
    """

    setting: str
    metric: str
    values: list[Finite]
    scores: list[Finite | None]
    chosen: Finite | None = None
    error: str | None = None

    @property
    def at_edge(self) -> bool:
        """Whether the smallest or the largest value was chosen: a better one may lie beyond."""
        return self.chosen in (self.values[0], self.values[-1])


def trial_jobs(study: Study, cell: Cell, folder: Path) -> dict[float, Job]:
    """Return the trials of a cell by the value that they try, in rising order."""
    tune, jobs = study.tune, dict[float, Job]()
    short = Cell(cell.name, cell.varied, with_length(cell.config, max(1, round(tune.share * cell.config.steps))))
    for factor in sorted(tune.factors):
        value = float(f"{factor * value_of(cell.config, tune.setting):.4g}")
        name = f"{cell.name}--tune-{value:g}"
        job = job_of(study, folder, with_value(short, tune.setting, value), tune.seed, name, analysed=False)
        jobs[value] = replace(job, keep_checkpoints=False)
    return jobs


def read_choice(cell: Cell, folder: Path) -> Choice | None:
    """Return the choice for a cell; None if it has not been made."""
    path = _file(cell, folder)
    if not path.exists():
        return None
    choice: Choice = read_json(path, Choice, "Choice of a study", remedy="Remove the file: the choice is made again.")
    return choice


def choose(study: Study, cell: Cell, folder: Path, states: dict[str, State]) -> Choice:
    """Return the choice for a cell whose trials have ended, and write it.

    Args:
        states: of the jobs that ran just now, by name.
    Raises:
        WadiError: if a result cannot be read, or the file not be written.
    """
    metric, scores, error = "", list[float | None](), None
    jobs = trial_jobs(study, cell, folder)
    for job in jobs.values():
        if job.done():
            metric, score = _score(job, study.tune.metric)
            scores.append(score)
        else:
            state = states.get(job.name) or job.state()
            error = f"{state.failed}: {state.error}"
            scores.append(None)
    sign = 1 if lower_is_better(study.tune.metric) else -1
    ranked = sorted((sign * score, value) for value, score in zip(jobs, scores, strict=True) if score is not None)
    choice = Choice(study.tune.setting, metric, list(jobs), scores, ranked[0][1] if ranked else None, error)
    if ranked:
        write_whole(_file(cell, folder), (json.dumps(asdict(choice), indent=1) + "\n").encode())
    return choice


def tuned(cell: Cell, choice: Choice) -> Cell:
    """Return the cell with the chosen value."""
    return cell if choice.chosen is None else with_value(cell, choice.setting, choice.chosen)


def all_trials(study: Study, cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, Job]]:
    """Yield the trials of the cells for which nothing has been chosen yet."""
    for cell in cells:
        if study.tune.factors and read_choice(cell, folder) is None:
            yield from ((cell, job) for job in trial_jobs(study, cell, folder).values())


def _score(job: Job, metric: str) -> tuple[str, float]:
    (row,) = read_result(job.run / "eval" / RESULT).rows
    for name, number in row.metrics.items():
        if name.split()[0] == metric:
            return name, number.value
    raise WadiError(f"tune.metric is {metric!r}, but the evaluation has {', '.join(row.metrics)}. Add it to eval.metrics.")


def _file(cell: Cell, folder: Path) -> Path:
    return folder / "state" / f"{cell.name}--tuned.json"
