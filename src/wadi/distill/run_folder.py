"""The folder of a run: its config, statistics and sample grids, and stopping between two steps."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from wadi import roles
from wadi.distill import config as configs
from wadi.distill.config import DistillConfig
from wadi.errors import Interrupted, WadiError
from wadi.io.files import remove_folder, write_whole
from wadi.io.outputs import JUNK, check_replaceable, check_writable, write_error
from wadi.io.progress import console
from wadi.io.records import Finite, read_json_lines
from wadi.io.regular import read_bytes, read_text
from wadi.io.temporary import sweep
from wadi.parallel.ranks import Ranks

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what some network file systems answer
ROLES = ("student", "fake")  # the adapter folders of a run
STEP_0 = "step-0000000"  # a checkpoint of it has nothing that a new start has not
WARM_START = "warm_start.safetensors"
_FIRST_FILES = rf"{re.escape(LOCK)}|\.config\.yaml\..*tmp"


class Run:
    """``runs/NAME`` on disk. Naming it checks that it is new, holds the same config, or holds no checkpoint; `open` writes.

    Raises:
        WadiError: if the folder cannot be written, or holds a run of another config (the difference is shown) or something
            else. On every process, whichever of them noticed.
    """

    def __init__(self, config: DistillConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.stats_file = self.folder / "stats.jsonl"
        self.config_file = self.folder / "config.yaml"
        self.ranks.first(self._check)

    def _check(self) -> None:
        try:
            if self.config_file.exists():
                changed = configs.differences(configs.load(self.config_file), self.config, sources=not self._saved())
                if changed and self._begun():
                    raise WadiError(
                        f"{str(self.folder)!r} holds a run of another config. Different: {'; '.join(changed)}. Expected the "
                        "same command as before, or another --out."
                    )
            elif self.folder.exists() and (not self.folder.is_dir() or self._foreign()):
                raise WadiError(
                    f"--out {str(self.folder)!r} exists and is no run (it holds no config.yaml). Expected a new or empty "
                    "folder: choose another --out."
                )
            check_writable(self.folder, folder=True)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def _begun(self) -> bool:
        """Whether there is something to continue, damaged or not."""
        return any(STEP_0 not in path.name for pattern in ("step-*", ".step-*") for path in self.checkpoints.glob(pattern))

    def _saved(self) -> bool:
        """Whether there is a checkpoint, whose digests say more about teacher and prompts than their names."""
        return any(path.name != STEP_0 for path in self.checkpoints.glob("step-*"))

    def _foreign(self) -> set[str]:
        """Names in the folder that are not of a start that was killed before it wrote the config."""
        names = {path.name for path in self.folder.iterdir() if not re.fullmatch(_FIRST_FILES, path.name)} - JUNK
        return names - ({"samples"} if self.samples.is_dir() and not any(self.samples.iterdir()) else set())

    def forget(self) -> None:
        """Remove what a start with other settings left that made no checkpoint: its pairs, images and statistics.

        Raises:
            WadiError: if the folder cannot be written.
        """
        if not self.config_file.exists() or self._begun():
            return
        if changed := configs.differences(configs.load(self.config_file), self.config):
            console.print(
                f"{self.folder} has no checkpoint of its earlier settings. It starts anew; changed: {'; '.join(changed)}.",
                soft_wrap=True,
            )
            try:
                for path in (self.folder / WARM_START, self.stats_file, *self.samples.glob("step-*.png")):
                    path.unlink(missing_ok=True)
                if (self.checkpoints / STEP_0).exists():
                    remove_folder(self.checkpoints / STEP_0)
            except OSError as error:
                raise write_error(self.folder, error) from error

    def open(self) -> None:
        """Create the folder and write the config; after everything else was checked, so that a mistyped run leaves no folder.

        Raises:
            WadiError: if the folder cannot be written.
        """
        try:
            if not (self.config_file.exists() and configs.load(self.config_file) == self.config):
                configs.save(self.config, self.config_file)
            self.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other run writes into the folder. The lock goes with the process that holds it.

        Raises:
            WadiError: if another process holds it, the folder cannot be written, or an adapter's folder contains other files.
        """
        path, held = self.folder / LOCK, list[int]()

        def take() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.extend(_locked(path))
            except OSError as error:
                raise write_error(self.folder, error) from error
            if not held:
                holder = read_text(path, limit=1000).strip() if path.exists() else "just ended"
                raise WadiError(
                    f"Another run is writing into {str(self.folder)!r} ({holder}). Expected one at a time: wait for it or stop "
                    "it, or choose another --out."
                )
            for role in ROLES:  # each save replaces these folders
                check_replaceable(self.folder / role, roles.FILES)
            sweep(self.folder, *ROLES)
            sweep(self.checkpoints, "step-*")

        try:
            self.ranks.first(take)
            yield
        finally:
            for stream in held:
                with suppress(OSError):  # the folder may have been removed
                    path.unlink()
                os.close(stream)

    def rewind(self, step: int) -> list[dict[str, float]]:
        """Drop statistics after ``step``, which a resumed run will write again; return those that stay."""
        lines = [line for line in read_stats(self.stats_file) if line["step"] <= step]
        text = "".join(_as_line(line) for line in lines).encode()
        if not self.stats_file.exists() or read_bytes(self.stats_file) != text:
            write_whole(self.stats_file, text)
        return lines

    def amend(self, history: list[dict[str, float]], stats: dict[str, float]) -> None:
        """Add ``stats`` to the last line of ``history``, on disk too; nothing if there is no line yet."""

        def act() -> None:
            if history:  # on the first process alone
                history[-1] |= stats
                write_whole(self.stats_file, "".join(_as_line(line) for line in history).encode())

        self.ranks.first(act)

    def grid_file(self, step: int) -> Path:
        """Where the sample grid of ``step`` lies."""
        return self.samples / f"step-{step:07d}.png"

    def grid_exists(self, step: int) -> bool:
        """Whether the sample grid of ``step`` is there; the same on all processes."""
        return bool(self.ranks.first(self.grid_file(step).exists))

    def log(self, line: dict[str, float]) -> None:
        """Append one line of statistics."""
        try:
            with open(self.stats_file, "a", encoding="utf-8") as stream:
                stream.write(_as_line(line))
        except OSError as error:
            raise write_error(self.stats_file, error) from error


def read_stats(path: Path) -> list[dict[str, float]]:
    """Return the lines of a ``stats.jsonl``, without a half-written last line; none if the file does not exist.

    Raises:
        WadiError: if another line is damaged, holds something other than numbers, or has no step.
    """
    if not path.exists():
        return []
    # A line has some 700 bytes, and a run may have millions.
    lines: list[dict[str, float]] = read_json_lines(
        path, dict[str, int | Finite], "Statistics", half_last_line=True, bounded=False
    )
    for number, line in enumerate(lines, 1):
        if "step" not in line:
            raise WadiError(f"Statistics {str(path)!r} have no 'step' in entry {number}. Restore or delete the file.")
    return lines


def _as_line(stats: dict[str, float]) -> str:
    """A line of statistics as JSON; what is not finite has no place there and is left out."""
    return json.dumps({name: value for name, value in stats.items() if math.isfinite(value)}) + "\n"


def _locked(path: Path) -> list[int]:
    """A descriptor of the file that holds its lock; none if another process does."""
    try:
        import fcntl
    except ImportError:  # a system without: two runs in one folder go unnoticed there
        return [os.open(path, os.O_RDWR | os.O_CREAT)]
    while True:
        stream = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # what a link leads to would be emptied
        try:
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                raise FileExistsError(errno.EEXIST, f"{path.name} is not a regular file")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(stream), path.stat()):  # not one that its holder just removed
                os.truncate(stream, 0)
                os.write(stream, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return [stream]
        except BlockingIOError:
            os.close(stream)
            return []
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                console.print(
                    f"[yellow]{path.parent} is on a file system without locks. Start no second run in it.[/]", soft_wrap=True
                )
                return [stream]
            os.close(stream)
            raise
        os.close(stream)


class Stopped(Exception):
    """Ends work that a stop makes pointless: the images of a grid, warm-start pairs. Raised by `Stop.check`."""


@dataclass
class Stop:
    """Set by a signal; looked at between two pieces of work. `agreed` and `check` are the same on all processes."""

    signal: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def agreed(self) -> bool:
        """Whether any process received a signal; every process must call it at the same place."""
        self.signal = self.ranks.largest(self.signal or 0) or None
        return self.signal is not None

    def interrupted(self, message: str) -> Interrupted:
        """The exception with which a command ends after a signal; ``message`` says what was saved."""
        return Interrupted(self.signal or signal.SIGTERM, message)

    def check(self) -> None:
        """Raise `Stopped` if any process received a signal; every process must call it at the same place."""
        if self.agreed():
            raise Stopped


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def stop_on_signals(ranks: Ranks | None = None) -> Iterator[Stop]:
    """Within the block SIGINT, SIGTERM and SIGHUP ask for a stop instead of making one; a second SIGINT interrupts at once.

    A signal that is ignored stays ignored: ``nohup`` ignores SIGHUP, and a shell SIGINT for what runs in its background.
    """
    stop = Stop(ranks=ranks or Ranks())
    terminals = [stream for stream in (0, 1, 2) if _is_terminal(stream)]

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number not in (signal.SIGINT, signal.SIGTERM):
            _let_go(terminals)
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:
        return False


def _let_go(terminals: list[int]) -> None:
    """Point streams of a terminal that hung up to nowhere: writing to it would fail, and nothing would be saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
