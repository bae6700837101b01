"""Read the results of all runs of a study into plain rows, one for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wadi.distill.config import DistillConfig
from wadi.distill.report.results import Analysis
from wadi.distill.run_folder import read_stats
from wadi.errors import WadiError, first_line
from wadi.evaluate.result import read_result
from wadi.io.metric_names import metric_label
from wadi.io.records import asdict, read_json
from wadi.study.cells import Cell
from wadi.study.jobs import RESULT, Job, State

# Values of a run besides the metrics of its images, and their headings.
LABELS = {
    "parameters": "trained parameters", "share": "share of the network's parameters", "steps": "steps",
    "minutes": "minutes of training", "direction_change": "direction change", "norm_change": "norm change",
    "norm_chance": "norm change of noise", "angle": "angle in radians", "energy_30": "energy in 30 % of the rank",
}  # fmt: skip
ANALYSED = {
    "direction_change": "direction_mean", "norm_change": "norm_mean", "norm_chance": "norm_chance", "angle": "angle_mean",
    "energy_30": "energy_30",
}  # fmt: skip


@dataclass(frozen=True)
class RunRow:
    """The results of one run.

    Attributes:
        status: ``done``, ``failed``, or ``missing`` if it has not run to its end.
        error: why it failed.
        values: by the names of `LABELS`, and by the names of metrics.
        protocol: hash of the protocol of its metrics; only runs with the same hash can be compared.
    """

    cell: str
    seed: int
    varied: dict[str, Any]
    status: str
    error: str | None = None
    values: dict[str, float] = field(default_factory=dict)
    protocol: str | None = None


def collect(runs: Sequence[tuple[Cell, int, Job]], failures: dict[str, State] | None = None) -> list[RunRow]:
    """Return a row for each run. A result that cannot be read makes its run a failed one.

    Args:
        failures: states of jobs that could not write their own, by name.
    Raises:
        WadiError: if two runs were evaluated by different protocols.
    """
    sizes = {cell.name: trained_parameters(cell.config) for cell in {cell.name: cell for cell, _, _ in runs}.values()}
    rows = [_row(cell, seed, job, sizes[cell.name], failures or {}) for cell, seed, job in runs]
    if len(hashes := {row.protocol for row in rows if row.protocol is not None}) > 1:
        raise WadiError(
            f"Runs of this study were evaluated by different protocols ({', '.join(sorted(h[:12] for h in hashes))}), so they "
            "cannot be compared. Remove the state/ folder of the study to evaluate all of them again."
        )
    return rows


def _row(cell: Cell, seed: int, job: Job, sizes: dict[str, float], failures: dict[str, State]) -> RunRow:
    state = failures.get(job.name)
    try:
        state = state or job.state()
        values, protocol = _values(job, state)
    except WadiError as unreadable:
        return RunRow(cell.name, seed, cell.varied, "failed", first_line(unreadable), dict(sizes))
    done = {name for name, _ in job.commands} <= state.seconds.keys()
    status = "done" if done else "failed" if state.failed and not state.interrupted else "missing"
    error = f"{state.failed}: {state.error}" if status == "failed" else None
    return RunRow(cell.name, seed, cell.varied, status, error, {**sizes, **values}, protocol)


def _values(job: Job, state: State) -> tuple[dict[str, float], str | None]:
    """Return what the finished commands of a run measured, and the hash of the protocol."""
    values, protocol = dict[str, float](), None
    if "distill" in state.seconds:
        last = read_stats(job.run / "stats.jsonl")[-1]
        values |= {"steps": last["step"], "minutes": last["seconds"] / 60}
    if "eval" in state.seconds:
        result = read_result(job.run / "eval" / RESULT)
        (row,) = result.rows
        values |= {name: number.value for name, number in row.metrics.items()}
        protocol = result.hash
    if "analyze" in state.seconds:
        means = asdict(read_json(job.run / "analysis" / "analysis.json", Analysis).summary)
        values |= {name: means[key] for name, key in ANALYSED.items() if means[key] is not None}
        if (job.run / "analysis" / "swap.json").exists():
            _, *hybrids = read_result(job.run / "analysis" / "swap.json").rows
            for row in hybrids:  # "teacher's norms, put back"
                own = {f"{name} with {row.name.partition(',')[0]}": number.value for name, number in row.metrics.items()}
                values |= own
    return values, protocol


def trained_parameters(config: DistillConfig) -> dict[str, float]:
    """Return how many parameters the student trains, and their share of the network; empty if that cannot be found out."""
    from wadi import roles
    from wadi.distill.objectives import with_defaults
    from wadi.distill.plan.architecture import read_architecture
    from wadi.distill.plan.plan import outline_backbone, plan_role

    try:
        backbone = outline_backbone(read_architecture(config.teacher), with_defaults(config))
        trained = plan_role(backbone, "student", config.student).parameters
    except WadiError:  # its runs report the error
        return {}
    network = sum(tensor.numel() for tensor in roles.base_tensors(backbone.network).values())
    return {"parameters": float(trained), "share": trained / network}


def metrics_of(rows: Sequence[RunRow]) -> list[str]:
    """Return the names of the metrics that any run has, in the order in which they were measured."""
    return list(dict.fromkeys(name for row in rows for name in row.values if name not in LABELS))


def label(name: str) -> str:
    """Return the heading of a value."""
    return LABELS.get(name) or metric_label(name)
