"""Run jobs on the machines of a Ray cluster (extra ``study``). The folder of the study must be on storage that they share.

A job whose worker or machine dies is started again by Ray, here or elsewhere, and continues from its last checkpoint.
"""

from __future__ import annotations

import importlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from wadi.errors import WadiError, first_line
from wadi.parallel.signals import stop_on_signals
from wadi.study.engines import Engine, Results, in_process
from wadi.study.jobs import Job, State, run_job

RETRIES = 3  # of a job whose worker died
ANSWER = 10.0  # seconds in which the address must accept a connection
LIMIT = 60.0  # seconds in which a cluster must answer


@contextmanager
def cluster(address: str, cpus: float = 1, gpus: float = 0) -> Iterator[Engine]:
    """Connect to a cluster, and yield a function that runs jobs on it.

    Args:
        address: of the cluster, as Ray takes it: ``auto``, ``local``, ``HOST:PORT`` or ``ray://HOST:PORT``.
        cpus, gpus: resources of one job.
    Raises:
        WadiError: if Ray is not installed, the address does not answer, or no machine can ever run a job.
    """
    ray = connect(address)
    try:
        _check_resources(ray, cpus, gpus)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(run_on_worker)
        yield partial(_run_tasks, ray, task)
    finally:
        ray.shutdown()


def _run_tasks(ray: Any, task: Any, jobs: Sequence[Job]) -> Results:
    """Run jobs as Ray tasks and yield each with its state when it ends.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGHUP; running jobs are asked to save.
    """
    with stop_on_signals() as stop:
        running = {task.remote(job): job for job in jobs}
        while running and stop.signal is None:
            ended, _ = ray.wait(list(running), timeout=0.5)
            for reference in ended:
                yield running.pop(reference), _state_of(ray, reference)
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=60)
    if stop.signal is not None:
        raise stop.interrupted("The study was stopped. The same command continues.")


def run_on_worker(job: Job) -> State:
    """Run a job on a machine of the cluster."""
    return run_job(job, in_process())


def connect(address: str) -> Any:
    """Connect to a cluster and return the module ``ray``.

    Raises:
        WadiError: see `cluster`.
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
    if address != "local":
        _probe(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except Exception as error:  # Ray raises errors of many classes, also of its transport
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise WadiError(f"--address {address!r} is not a Ray cluster that can be used: {reason}.") from error
    return ray


def _probe(address: str) -> None:
    """Connect in another process, which is given up after `LIMIT` seconds: Ray may wait forever for a server of another kind.

    Raises:
        WadiError: if this fails.
    """
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise WadiError(f"--address {address!r} is not a Ray cluster: no answer in {LIMIT:g} seconds.") from error
    if ended.returncode:
        last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), f"exit code {ended.returncode}")
        raise WadiError(f"--address {address!r} is not a Ray cluster that can be used: {last.strip()}")


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
