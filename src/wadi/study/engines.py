"""Run jobs on this machine, one after the other or several at once, each command in a process of its own."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from wadi.errors import WadiError
from wadi.io.outputs import write_error
from wadi.parallel.signals import Stop, stop_on_signals
from wadi.study.jobs import Execute, Job, State, run_job

Results = Iterator[tuple[Job, State]]
Engine = Callable[[Sequence[Job]], Results]
POLL = 0.1  # seconds between looks at a process
ENDING = 120.0  # seconds that a stopped command has to save its state


def run_here(jobs: Sequence[Job], workers: int = 1, execute: Execute | None = None) -> Results:
    """Run jobs on this machine and yield each with its state when it ends.

    Args:
        workers: how many run at once; they share the processor's cores.
        execute: runs one command; None = in a process of its own.
    Raises:
        WadiError: if a state cannot be written. Started jobs end first.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after the running commands have saved.
    """
    with stop_on_signals() as stop, ThreadPoolExecutor(workers) as pool:
        act = execute or in_process(stop, threads=None if workers == 1 else max(1, _cores() // workers))
        waiting = iter(jobs)
        running = {pool.submit(run_job, job, act): job for job in itertools.islice(waiting, workers)}
        while running:
            ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                state = future.result()
                if stop.signal is None and (following := next(waiting, None)) is not None:
                    running[pool.submit(run_job, following, act)] = following
                yield job, state
    if stop.signal is not None:
        raise stop.interrupted("The study was stopped, and its runs are saved. The same command continues.")


def in_process(stop: Stop | None = None, threads: int | None = None) -> Execute:
    """Return a function that runs a command in a process of its own.

    Args:
        stop: on a request to stop, the process is asked to save and end.
        threads: processor threads of the command, unless ``OMP_NUM_THREADS`` is set; None = torch's choice.
    """

    def execute(words: list[str], log: Path) -> int:
        environment = dict(os.environ)
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        command = [sys.executable, "-m", "wadi.study.child", str(os.getpid()), *words]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as stream:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment
                )
        except OSError as error:
            raise write_error(log, error) from error
        return _finish(process, stop)

    return execute


def _finish(process: subprocess.Popen[bytes], stop: Stop | None) -> int:
    """Wait for a process and return its exit code; stop it if that is requested, or if this process is interrupted."""
    asked = False
    try:
        while True:
            try:
                return process.wait(POLL)
            except subprocess.TimeoutExpired:
                if stop is not None and stop.signal is not None and not asked:
                    process.send_signal(signal.SIGTERM)
                    asked = True
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int, address: str | None) -> None:
    """Raise `WadiError` for options that exclude each other."""
    if address is not None and workers != 1:
        raise WadiError(f"--jobs is {workers}, but with --address the cluster decides how many run at once. Leave out --jobs.")
