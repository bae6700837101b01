"""The folder of a run: its config, statistics and sample grids, and stopping between two steps."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from wadi import adapters
from wadi import config as configs
from wadi.config import DistillConfig
from wadi.errors import WadiError
from wadi.files import refuse_foreign, sweep, unwritable, write_whole
from wadi.io.records import Finite, read_json_lines
from wadi.io.regular import read_text
from wadi.ranks import Ranks

LOCK = ".lock"
ROLES = ("student", "fake")  # the adapter folders of a run


class Run:
    """``runs/NAME`` on disk. Naming it checks that it is new or holds the same config; `open` writes.

    Raises:
        WadiError: if the folder holds a run of another config (the difference is shown), or something else.
    """

    def __init__(self, config: DistillConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.stats_file = self.folder / "stats.jsonl"
        self.config_file = self.folder / "config.yaml"
        if self.config_file.exists():
            changed = configs.differences(configs.load(self.config_file), config)
            if changed:
                raise WadiError(
                    f"{str(self.folder)!r} holds a run of another config. Different: {'; '.join(changed)}. Expected the same "
                    "command as before, or another --out."
                )
        elif self.folder.exists() and (not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - {LOCK}):
            raise WadiError(
                f"--out {str(self.folder)!r} exists and is no run (it holds no config.yaml). Expected a new or empty folder: "
                "choose another --out."
            )

    def open(self) -> None:
        """Create the folder and write the config; after everything else was checked, so that a mistyped run leaves no folder.

        Raises:
            WadiError: if the folder cannot be written.
        """
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        configs.save(self.config, self.config_file)

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
                raise unwritable(self.folder, error) from error
            if not held:
                holder = read_text(path, limit=1000).strip() if path.exists() else "just ended"
                raise WadiError(
                    f"Another run is writing into {str(self.folder)!r} ({holder}). Expected one at a time: wait for it or stop "
                    "it, or choose another --out."
                )
            for role in ROLES:  # each save replaces these folders
                refuse_foreign(self.folder / role, adapters.FILES)
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
        write_whole(self.stats_file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return lines

    def log(self, line: dict[str, float]) -> None:
        """Append one line of statistics; what is not finite has no place in JSON and is left out."""
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        try:
            with open(self.stats_file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise unwritable(self.stats_file, error) from error


def read_stats(path: Path) -> list[dict[str, float]]:
    """Return the lines of a ``stats.jsonl``, without a half-written last line; none if the file does not exist.

    Raises:
        WadiError: if another line is damaged, holds something other than numbers, or has no step.
    """
    if not path.exists():
        return []
    lines: list[dict[str, float]] = read_json_lines(path, dict[str, Finite], "Statistics", half_last_line=True)
    for number, line in enumerate(lines, 1):
        if "step" not in line:
            raise WadiError(f"Statistics {str(path)!r} have no 'step' in entry {number}. Restore or delete the file.")
    return lines


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
        except BaseException:
            os.close(stream)
            raise
        os.close(stream)


class Interrupted(Exception):
    """A signal asked for a stop; everything is saved. ``signal`` is its number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass
class Stop:
    """Set by SIGINT and SIGTERM; the loop looks at it between two steps. All processes see the same."""

    signal: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def __bool__(self) -> bool:
        self.signal = self.ranks.largest(self.signal or 0) or None
        return self.signal is not None


@contextmanager
def stop_on_signals(ranks: Ranks | None = None) -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM ask for a stop instead of making one; a second SIGINT interrupts at once."""
    stop = Stop(ranks=ranks or Ranks())

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
