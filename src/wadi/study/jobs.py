"""One run of a study: train, evaluate, analyse, each an ordinary command; and the state that it leaves behind.

A state is written after every command, so a killed study repeats at most one of them, and each command continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from wadi.distill.config import DistillConfig
from wadi.distill.config_files import save_config
from wadi.distill.run_folder import WARM_START
from wadi.errors import WadiError
from wadi.evaluate.protocols import NAMES
from wadi.io.files import remove_folder, write_whole
from wadi.io.records import Finite, Record, asdict, read_json
from wadi.io.regular import open_regular, read_bytes
from wadi.study.cells import Cell
from wadi.study.file import EvalSettings, Study
from wadi.study.folder import FILE
from wadi.zoo.paths import absolute_source

Execute = Callable[[list[str], Path], int]  # runs ``wadi WORDS`` with its output in a log file; returns the exit code
Commands = tuple[tuple[str, tuple[str, ...]], ...]  # names and words
INTERRUPTED = (-2, -15, -1, 129, 130, 143)  # exit codes of a command that a signal stopped
RESULT = "study.json"  # of `wadi eval`, in the folder eval/ of the run
LONGEST = 500  # characters of an error in a report


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
    """One training run and what follows it. All paths are absolute: any machine that sees the folder can run it.

    Attributes:
        name: of the run's folder, state and log.
        folder: of the study.
        config: settings of the run.
        commands: names and words of the commands, in order.
        share_pairs: whether to take the pairs of a warm start from another run of the study that made the same ones.
        keep_checkpoints: whether they stay when all commands have finished; those of a trial only take space.
    """

    name: str
    folder: Path
    config: DistillConfig
    commands: Commands
    share_pairs: bool = True
    keep_checkpoints: bool = True

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.folder / "runs" / self.name

    @property
    def state_file(self) -> Path:
        """The file with the state of the run."""
        return self.folder / "state" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """The file with the output of the commands."""
        return self.folder / "logs" / f"{self.name}.log"

    def state(self) -> State:
        """Return how far the run is."""
        if not self.state_file.exists():
            return State()
        state: State = read_json(self.state_file, State, "State of a run", remedy="Remove the file: the run continues.")
        return state

    def done(self) -> bool:
        """Return whether all commands have finished."""
        return {name for name, _ in self.commands} <= self.state().seconds.keys()

    @property
    def shared_pairs(self) -> Path | None:
        """The study's file of the warm-start pairs that this run needs; None if it needs none, or makes its own."""
        config, warm = self.config, self.config.warm_start
        if not self.share_pairs or not warm.pairs:
            return None
        about = (config.teacher, config.prompts, config.prompts_field, config.seed, config.resolution, config.dtype,
                 warm.pairs, warm.sampler_steps, warm.guidance_scale)  # fmt: skip
        return self.folder / "pairs" / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.safetensors"


def job_of(
    study: Study, folder: Path, cell: Cell, seed: int, name: str, *, evaluated: bool = True, analysed: bool = True
) -> Job:
    """Return the job that trains a cell with a seed.

    Args:
        evaluated, analysed: whether the training is followed by an evaluation, and by the analysis that the study asks for.
    """
    folder = folder.resolve()
    run, own = folder / "runs" / name, cell.config
    teacher = absolute_source(own.teacher)
    config = replace(own, seed=seed, out=str(run), teacher=teacher, prompts=_absolute(own.prompts))
    device = () if own.device is None else ("--device", own.device)
    images = ("--pictures", str(folder / "images"))
    commands = [("distill", ("distill", "--config", str(folder / "configs" / f"{name}.yaml")))]
    evaluation = _absolute_eval(study.eval)
    if evaluated:
        words = ("eval", str(run), *evaluation.words(), *device, *images, "--out", str(run / "eval" / RESULT))
        commands.append(("eval", words))
    if analysed and study.analysis:
        words = ("analyze", teacher, str(run), "--out", str(run / "analysis"), *device)
        commands.append(("analyze", (*words, *_swap_words(evaluation), *images) if study.swap else words))
    return Job(name, folder, config, tuple(commands))


def run_name(cell: Cell, seed: int) -> str:
    """Return the name of a run."""
    return f"{cell.name}--seed-{seed}"


def run_job(job: Job, execute: Execute) -> State:
    """Run the commands of a job that have not finished yet, up to the first that fails. Return the state, which is also saved.

    Raises:
        WadiError: if the folder of the study is not visible here, or cannot be written.
    """
    if not (job.folder / FILE).is_file():
        raise WadiError(f"{str(job.folder)!r} is not visible on this machine. Put --out on storage that all machines share.")
    state = State(seconds=job.state().seconds)
    for name, words in job.commands:
        if name in state.seconds:
            continue
        if name == "distill":
            save_config(job.config, job.folder / "configs" / f"{job.name}.yaml")
            _take_pairs(job)
        start, offset = time.perf_counter(), job.log.stat().st_size if job.log.exists() else 0
        code = execute(list(words), job.log)
        if code:
            state.failed, state.interrupted = name, code in INTERRUPTED
            state.error = _message(job.log, offset, code)
        else:
            state.seconds[name] = time.perf_counter() - start
        write_whole(job.state_file, (json.dumps(asdict(state), indent=1) + "\n").encode())
        if code:
            break
        if name == "distill":
            _give_pairs(job)
    if state.failed is None and not job.keep_checkpoints and (job.run / "checkpoints").exists():
        remove_folder(job.run / "checkpoints")
    return state


def _take_pairs(job: Job) -> None:
    """Give a new run the pairs that an earlier run of the study made from the same teacher, prompts and seed."""
    from wadi.distill.objectives import with_defaults

    if job.shared_pairs is not None and job.shared_pairs.exists() and not (job.run / "config.yaml").exists():
        save_config(with_defaults(job.config), job.run / "config.yaml")  # a folder without one is not a run
        write_whole(job.run / WARM_START, read_bytes(job.shared_pairs))


def _give_pairs(job: Job) -> None:
    if job.shared_pairs is not None and not job.shared_pairs.exists() and (job.run / WARM_START).exists():
        write_whole(job.shared_pairs, read_bytes(job.run / WARM_START))


def _message(log: Path, offset: int, code: int) -> str:
    """Return the error that a command printed, or its last line."""
    if not log.exists():
        return f"exit code {code}"
    with open_regular(log, what="Log") as stream:
        stream.seek(offset)
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("wadi: ") for line in lines if line.startswith("wadi: ")]
    if errors:
        return errors[-1][:LONGEST]
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{killed}{': ' + lines[-1][:LONGEST] if lines else ''}"


def _absolute(path: str) -> str:
    """Return the absolute path of a file or folder that exists; other sources (Hub ids, zoo, patterns) are unchanged."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _absolute_eval(settings: EvalSettings) -> EvalSettings:
    protocol = settings.protocol if settings.protocol in NAMES else _absolute(settings.protocol)
    return replace(settings, protocol=protocol, reference=settings.reference and _absolute(settings.reference))


def _swap_words(settings: EvalSettings) -> tuple[str, ...]:
    """Return the words of ``wadi analyze`` that evaluate hybrids on the prompts and metrics of the evaluation."""
    given = {
        "prompts": None if settings.protocol in NAMES else settings.protocol, "count": settings.count,
        "metrics": ",".join(settings.metrics) or None, "steps": settings.teacher_steps,
        "guidance-scale": settings.teacher_guidance_scale, "draw-batch": settings.draw_batch,
    }  # fmt: skip
    options = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return ("--swap-eval", *(word for option in options for word in option))
