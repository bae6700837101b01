"""Run jobs on the machines of a Ray cluster (extra ``study``). The folder of the study must be on storage that they share.

A job whose worker or machine dies is started again by Ray, here or elsewhere, and continues from its last checkpoint.
"""

from __future__ import annotations

import importlib
import re
import socket
from collections.abc import Sequence
from typing import Any

from wadi.errors import WadiError, first_line
from wadi.parallel.signals import stop_on_signals
from wadi.study.engines import Results, in_process
from wadi.study.jobs import Job, State, run_job

RETRIES = 3  # of a job whose worker died
ANSWER = 10.0  # seconds in which the address must accept a connection


def run_on_cluster(jobs: Sequence[Job], address: str, cpus: float = 1, gpus: float = 0) -> Results:
    """Run jobs as Ray tasks and yield each with its state when it ends.

    Args:
        address: of the cluster, as Ray takes it: ``auto``, ``local``, ``HOST:PORT`` or ``ray://HOST:PORT``.
        cpus, gpus: resources of one job.
    Raises:
        WadiError: if Ray is not installed, or the address does not answer.
        Interrupted: on SIGINT, SIGTERM or SIGHUP; running jobs are asked to save.
    """
    ray = connect(address)
    try:
        _check_resources(ray, cpus, gpus)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(run_on_worker)
        with stop_on_signals() as stop:
            running = {task.remote(job): job for job in jobs}
            while running and stop.signal is None:
                ended, _ = ray.wait(list(running), timeout=0.5)
                for reference in ended:
                    job = running.pop(reference)
                    yield job, _state_of(ray, reference)
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=60)
        if stop.signal is not None:
            raise stop.interrupted("The study was stopped. The same command continues.")
    finally:
        ray.shutdown()


def run_on_worker(job: Job) -> State:
    """Run a job on a machine of the cluster."""
    return run_job(job, in_process())


def connect(address: str) -> Any:
    """Connect to a cluster and return the module ``ray``.

    Raises:
        WadiError: see `run_on_cluster`.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise WadiError(f"--address {address!r} needs Ray: pip install 'wadi-onestep[study]'.") from error
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", address)
    if found:
        try:
            socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=ANSWER).close()
        except (OSError, OverflowError) as error:
            raise WadiError(
                f"--address {address!r} does not answer: {first_line(error)}. Start a cluster with `ray start --head`."
            ) from error
    elif address not in ("auto", "local"):
        raise WadiError(f"--address is {address!r}. Use auto, local, HOST:PORT or ray://HOST:PORT.")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except Exception as error:  # Ray raises errors of many classes, also of its transport
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise WadiError(f"--address {address!r} is not a Ray cluster that can be used: {reason}.") from error
    return ray


def _check_resources(ray: Any, cpus: float, gpus: float) -> None:
    """Raise `WadiError` if no machine of the cluster can ever run a job: it would wait forever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in machines):
        largest = {kind: max((node.get(kind, 0) for node in machines), default=0) for kind in ("CPU", "GPU")}
        raise WadiError(
            f"No machine of the cluster has --cpus {cpus:g} and --gpus {gpus:g}: the largest has {largest['CPU']:g} CPUs and "
            f"{largest['GPU']:g} GPUs. Lower them."
        )


def _state_of(ray: Any, reference: Any) -> State:
    """Return the state that a task returned, or the error that ended it, so that the other jobs go on."""
    try:
        state: State = ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        return State(failed="cluster", error=first_line(cause))
    return state
