"""The folder of a run: its config, statistics and image grids, and the lock that keeps a second run out."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from wadi import roles
from wadi.distill import config_files
from wadi.distill.config import DistillConfig
from wadi.errors import WadiError
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
STEP_0 = "step-0000000"  # its checkpoint holds no training yet
WARM_START = "warm_start.safetensors"
WARM_START_PARTS = "warm_start_parts"  # folder of the pairs that are made so far
REAL_IMAGES = "real_images.safetensors"
_FIRST_FILES = rf"{re.escape(LOCK)}|\.config\.yaml\..*tmp"


class Run:
    """The folder of a run. The constructor checks that it can be used; `open` writes to it. Communicates.

    A folder can be used if it is new or empty, has the same config, or has no checkpoint yet.

    Args:
        ranks: the processes of the run; None = this one alone.
    Raises:
        WadiError: if the folder cannot be written, or contains other files or a run with another config (the message shows the
            difference).
    """

    def __init__(self, config: DistillConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.stats_file = self.folder / "stats.jsonl"
        self.config_file = self.folder / "config.yaml"
        self.ranks.on_first(self._check)

    def _check(self) -> None:
        try:
            if self.config_file.exists():
                changed = config_files.changed_settings(
                    config_files.load_config(self.config_file), self.config, sources=not self._has_checkpoint()
                )
                if changed and self._has_any_checkpoint():
                    raise WadiError(
                        f"{str(self.folder)!r} contains a run with another config. Different: {'; '.join(changed)}. Use the "
                        "same command as before, or choose another --out."
                    )
            elif self.folder.exists() and (not self.folder.is_dir() or self._other_files()):
                raise WadiError(
                    f"--out {str(self.folder)!r} exists and is not a run (it has no config.yaml). Choose a new folder."
                )
            check_writable(self.folder, folder=True)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def _has_any_checkpoint(self) -> bool:
        """Return whether there is something to continue, damaged or not."""
        return any(STEP_0 not in path.name for pattern in ("step-*", ".step-*") for path in self.checkpoints.glob(pattern))

    def _has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint. Its digests identify teacher and prompts better than their names do."""
        return any(path.name != STEP_0 for path in self.checkpoints.glob("step-*"))

    def _other_files(self) -> set[str]:
        """Return names in the folder that a run did not write before it was killed at its start."""
        names = {path.name for path in self.folder.iterdir() if not re.fullmatch(_FIRST_FILES, path.name)} - JUNK
        return names - ({"samples"} if self.samples.is_dir() and not any(self.samples.iterdir()) else set())

    def forget(self) -> None:
        """Remove the pairs, images and statistics of an earlier start with other settings that saved no checkpoint.

        Raises:
            WadiError: if the folder cannot be written.
        """
        if not self.config_file.exists() or self._has_any_checkpoint():
            return
        if changed := config_files.changed_settings(config_files.load_config(self.config_file), self.config):
            console.print(
                f"{self.folder} has no checkpoint of its earlier settings, so it starts again. Changed: {'; '.join(changed)}.",
                soft_wrap=True,
            )
            try:
                for path in (
                    self.folder / WARM_START,
                    self.folder / REAL_IMAGES,
                    self.stats_file,
                    *self.samples.glob("step-*.png"),
                ):
                    path.unlink(missing_ok=True)
                for folder in (self.checkpoints / STEP_0, self.folder / WARM_START_PARTS):
                    if folder.exists():
                        remove_folder(folder)
            except OSError as error:
                raise write_error(self.folder, error) from error

    def open(self) -> None:
        """Create the folder and write the config. Call it after all checks, so that a mistyped command leaves no folder.

        Raises:
            WadiError: if the folder cannot be written.
        """
        try:
            if not (self.config_file.exists() and config_files.load_config(self.config_file) == self.config):
                config_files.save_config(self.config, self.config_file)
            self.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other run can write into the folder. The lock ends with the process that has it. Communicates.

        Raises:
            WadiError: if another process has the lock, the folder cannot be written, or an adapter's folder contains other
                files.
        """
        path, descriptors = self.folder / LOCK, list[int]()

        def take() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptors.extend(lock_file(path))
            except OSError as error:
                raise write_error(self.folder, error) from error
            if not descriptors:
                holder = read_text(path, limit=1000).strip() if path.exists() else "just ended"
                raise WadiError(
                    f"Another run is writing into {str(self.folder)!r} ({holder}). Wait for it, stop it, or choose another "
                    "--out."
                )
            for role in ROLES:  # each save replaces these folders
                check_replaceable(self.folder / role, roles.FILES)
            sweep(self.folder, *ROLES)
            sweep(self.checkpoints, "step-*")

        try:
            self.ranks.on_first(take)
            yield
        finally:
            unlock_file(path, descriptors)

    def rewind(self, step: int) -> list[dict[str, float]]:
        """Drop statistics after ``step``, which a resumed run writes again. Return the lines that stay."""
        lines = [line for line in read_stats(self.stats_file) if line["step"] <= step]
        text = "".join(_as_line(line) for line in lines).encode()
        if not self.stats_file.exists() or read_bytes(self.stats_file) != text:
            write_whole(self.stats_file, text)
        return lines

    def amend(self, history: list[dict[str, float]], stats: dict[str, float]) -> None:
        """Add ``stats`` to the last line of ``history`` and of the file, if there is one. Communicates."""

        def act() -> None:
            if history:  # only the first process has it
                history[-1] |= stats
                write_whole(self.stats_file, "".join(_as_line(line) for line in history).encode())

        self.ranks.on_first(act)

    def grid_file(self, step: int) -> Path:
        """Return the path of the image grid of ``step``."""
        return self.samples / f"step-{step:07d}.png"

    def grid_exists(self, step: int) -> bool:
        """Return whether the image grid of ``step`` exists, the same on all processes. Communicates."""
        return bool(self.ranks.on_first(self.grid_file(step).exists))

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
    """Return a line of statistics as JSON. Numbers that are not finite are left out: JSON has none."""
    return json.dumps({name: value for name, value in stats.items() if math.isfinite(value)}) + "\n"


def lock_file(path: Path) -> list[int]:
    """Lock a file and return its descriptor; an empty list if another process has the lock."""
    try:
        import fcntl
    except ImportError:  # a system without locks, where two runs in one folder are not noticed
        return [os.open(path, os.O_RDWR | os.O_CREAT)]
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # the target of a link would be emptied
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileExistsError(errno.EEXIST, f"{path.name} is not a regular file")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):  # not a file that its owner just removed
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return [descriptor]
        except BlockingIOError:
            os.close(descriptor)
            return []
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                console.print(
                    f"[yellow]{path.parent} is on a file system without locks. Start no second run in it.[/]", soft_wrap=True
                )
                return [descriptor]
            os.close(descriptor)
            raise
        os.close(descriptor)


def unlock_file(path: Path, descriptors: Sequence[int]) -> None:
    """Remove a file that `lock_file` locked, and release it."""
    for descriptor in descriptors:
        with suppress(OSError):  # the folder may have been removed
            path.unlink()
        os.close(descriptor)


def is_running(lock: Path) -> bool:
    """Return whether the process that wrote a run's lock file lives. The lock itself is not touched.

    A killed run leaves the file behind. A process on another machine counts as alive.
    """
    try:
        text = read_text(lock, limit=1000)
    except WadiError:
        return False
    holder = re.match(r"process (\d{1,12}) on (.*)", text.strip())
    if holder is None or holder[2] != socket.gethostname():
        return True
    import psutil

    return bool(psutil.pid_exists(int(holder[1])))
