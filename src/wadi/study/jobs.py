"""One run of a study: train, evaluate, analyse, each an ordinary command; and the state that it leaves behind.

A state is written after every command, so a killed study repeats at most one of them, and each command continues where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from wadi.distill.config_files import save_config
from wadi.errors import WadiError
from wadi.evaluate.protocols import NAMES
from wadi.io.files import write_whole
from wadi.io.records import Finite, Record, asdict, read_json
from wadi.study.cells import Cell
from wadi.study.file import EvalSettings
from wadi.study.folder import FILE
from wadi.zoo.paths import absolute_source

Execute = Callable[[list[str], Path], int]  # runs ``wadi WORDS`` with its output in a log file; returns the exit code
INTERRUPTED = (-2, -15, -1, 129, 130, 143)  # exit codes of a command that a signal stopped
RESULT = "study.json"  # of `wadi eval`, in the folder eval/ of the run
SAID = 500  # characters of an error in a report


class State(Record):
    """How far a run is.

    Attributes:
        seconds: duration of each finished command.
        failed: the command that failed, and ``error`` its message; None = none so far.
        interrupted: whether a signal stopped it; it can be continued.
    """

    seconds: dict[str, Finite] = msgspec.field(default_factory=dict)
    failed: str | None = None
    error: str | None = None
    interrupted: bool = False


@dataclass(frozen=True)
class Job:
    """One run of a study: a cell and a seed. All paths are absolute, so that any machine that sees the folder can run it.

    Attributes:
        name: of the run's folder, state and log.
        folder: of the study.
        commands: names and words of the commands, in order.
    """

    name: str
    folder: Path
    commands: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def state_file(self) -> Path:
        """The file with the state of the run."""
        return self.folder / "state" / f"{self.name}.json"

    def state(self) -> State:
        """Return how far the run is."""
        if not self.state_file.exists():
            return State()
        state: State = read_json(self.state_file, State, "State of a run", remedy="Remove the file: the run continues.")
        return state

    def done(self) -> bool:
        """Return whether all commands have finished."""
        return {name for name, _ in self.commands} <= self.state().seconds.keys()


def job_of(folder: Path, cell: Cell, seed: int, evaluation: EvalSettings | None, analysis: bool, name: str = "") -> Job:
    """Write the settings file of a run and return its job.

    Args:
        evaluation: None = no evaluation.
        name: default is the cell's name and the seed.
    Raises:
        WadiError: if the file cannot be written.
    """
    folder, name = folder.resolve(), name or run_name(cell, seed)
    run = folder / "runs" / name
    config = replace(
        cell.config,
        seed=seed,
        out=str(run),
        teacher=absolute_source(cell.config.teacher),
        prompts=_absolute(cell.config.prompts),
    )
    settings = folder / "configs" / f"{name}.yaml"
    save_config(config, settings)
    device = () if config.device is None else ("--device", config.device)
    commands = [("distill", ("distill", "--config", str(settings)))]
    if evaluation is not None:
        words = (*_absolute_eval(evaluation).words(), *device, "--pictures", str(folder / "images"))
        commands.append(("eval", ("eval", str(run), *words, "--out", str(run / "eval" / RESULT))))
    if analysis:
        commands.append(("analyze", ("analyze", config.teacher, str(run), "--out", str(run / "analysis"), *device)))
    return Job(name, folder, tuple(commands))


def run_name(cell: Cell, seed: int) -> str:
    """Return the name of a run."""
    return f"{cell.name}--seed-{seed}"


def run_job(job: Job, execute: Execute) -> State:
    """Run the commands of a job that have not finished yet, up to the first that fails. Return the state, which is also saved.

    Raises:
        WadiError: if the folder of the study is not visible here, or its state cannot be written.
    """
    if not (job.folder / FILE).is_file():
        raise WadiError(f"{str(job.folder)!r} is not visible on this machine. Put --out on storage that all machines share.")
    log = job.folder / "logs" / f"{job.name}.log"
    state = State(seconds=job.state().seconds)
    for name, words in job.commands:
        if name in state.seconds:
            continue
        start, offset = time.perf_counter(), log.stat().st_size if log.exists() else 0
        code = execute(list(words), log)
        if code:
            state.failed, state.interrupted = name, code in INTERRUPTED
            state.error = _message(log, offset, code)
        else:
            state.seconds[name] = time.perf_counter() - start
        write_whole(job.state_file, (json.dumps(asdict(state), indent=1) + "\n").encode())
        if code:
            break
    return state


def _message(log: Path, offset: int, code: int) -> str:
    """Return the error that a command printed, or its last line."""
    if not log.exists():
        return f"exit code {code}"
    with open(log, "rb") as stream:
        stream.seek(offset)
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("wadi: ") for line in lines if line.startswith("wadi: ")]
    if errors:
        return errors[-1][:SAID]
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{killed}{': ' + lines[-1][:SAID] if lines else ''}"


def _absolute(path: str) -> str:
    """Return the absolute path of a file or folder that exists; other sources (Hub ids, zoo, patterns) are unchanged."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _absolute_eval(settings: EvalSettings) -> EvalSettings:
    protocol = settings.protocol if settings.protocol in NAMES else _absolute(settings.protocol)
    return replace(settings, protocol=protocol, reference=settings.reference and _absolute(settings.reference))
