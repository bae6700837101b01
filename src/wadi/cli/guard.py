"""The last resort of the command line: whatever happens, a command ends with one line and an exit code.

2: bad input. 1: an unexpected failure, a library's own included; ``--debug`` (or ``WADI_DEBUG=1``) prints its traceback.
130: Ctrl-C. 143, 129: SIGTERM, SIGHUP, after saving, of a command that can be continued. 141: the reader of standard output is
gone (``| head``).
"""

from __future__ import annotations

import _thread
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from wadi.errors import Interrupted, WadiError

FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
REFUSED = (  # what the system says of a path that it does not let us use
    *FULL, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ESTALE,
    errno.ENXIO,
)  # fmt: skip
LONGEST = 400  # characters of a library's message


def split_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without ``--debug`` (up to ``--``), and whether it or ``WADI_DEBUG`` was given."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    kept = [word for word in arguments[:end] if word != "--debug"]
    return [*kept, *arguments[end:]], len(kept) < end or os.environ.get("WADI_DEBUG", "") not in ("", "0")


def guard(command: str, act: Callable[[], int], debug: bool = False) -> int:
    """Return the exit code of ``act``; turn whatever it raises into one line on stderr and a code.

    `SystemExit` passes, with which the parser ends after ``--help``.
    """
    with _interrupts() as interrupts:
        try:
            code = act()
            _flush()
        except KeyboardInterrupt:
            interrupts.seen, code = True, INTERRUPTED
        except BrokenPipeError:
            return _broken_pipe()
        except Interrupted as stopped:
            return _say(stopped, str(stopped), debug, 128 + stopped.signal)
        except WadiError as error:
            code = _say(error, str(error), debug, BAD_INPUT)
        except Exception as error:
            code = _unexpected(command, error, debug)
    # A library may swallow the interrupt, as some do while they are imported.
    if interrupts.seen and code in (0, INTERRUPTED):
        print("wadi: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


def refuse_undecodable(arguments: Sequence[str]) -> None:
    """Raise `WadiError` for an argument that is not UTF-8: Python keeps such bytes as lone surrogates, which no file takes."""
    for number, word in enumerate(arguments, 1):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(word) if sys.getfilesystemencoding() == "utf-8" else word.encode("utf-8", "backslashreplace")
            raise WadiError(
                f"Argument {number} is not UTF-8 text: {shown[:200]!r}. Type it as UTF-8; rename a file or folder whose name "
                "is in another encoding."
            ) from error


def _unexpected(command: str, error: Exception, debug: bool) -> int:
    if isinstance(error, OSError) and error.errno in REFUSED and (error.filename is not None or error.errno in FULL):
        where = "" if error.filename is None else f" ({str(error.filename)[:100]!r})"
        return _say(error, f"{command}: {error.strerror}{where}. Give another path.", debug, BAD_INPUT)
    reason = " ".join(str(error).split()) or "no message"
    if _out_of_memory(error):
        line = (
            f"{command} ran out of memory in {_place(error)}: {reason[:LONGEST].rstrip('.')}. Use a smaller batch or size, or "
            "--dtype bfloat16."
        )
        return _say(error, line, debug, BAD_INPUT)
    line = (
        f"{command} failed unexpectedly in {_place(error)}: {type(error).__name__}: {reason[:LONGEST].rstrip('.')}. "
        "Run the same command with --debug for the traceback, and report it: bad input should have a better message."
    )
    return _say(error, line, debug, FAILED)


def _out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says so; without importing torch, which alone raises errors of its own for it."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from wadi.parallel.device import out_of_memory

    return out_of_memory(error)


def _place(error: BaseException) -> str:
    """The innermost function of this package that the error passed through: what the command was doing."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if frame.f_globals.get("__name__", "").split(".")[0] == "wadi"] or frames[-1:]
    if not own:
        return "an unknown place"
    code = own[-1].f_code
    return f"{own[-1].f_globals.get('__name__')}.{getattr(code, 'co_qualname', code.co_name)}".replace(".<locals>", "")


def _say(error: BaseException, line: str, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exception(error)
    with suppress(OSError):  # stderr may be closed
        print(f"wadi: {' '.join(line.split())}", file=sys.stderr)
    return code


# --- standard output --------------------------------------------------------------------------------------------------------


def forgiving_output() -> None:
    """Let characters that the terminal's encoding lacks be written as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _broken_pipe() -> int:
    """Point standard output at nothing, so that the flush at exit does not fail again."""
    with suppress(OSError, ValueError, AttributeError):  # it may be closed, or have no descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    return BROKEN_PIPE


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Interrupts:
    seen: bool = False


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Within the block Ctrl-C raises `KeyboardInterrupt` and is remembered.

    Python drops an exception that a destructor raises, and goes on. An interrupt that ends there is sent once more.
    """
    interrupts, report = _Interrupts(), sys.unraisablehook

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.seen = True
        raise KeyboardInterrupt

    def send_again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.02, _thread.interrupt_main).start()
        else:
            report(dropped)

    ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = send_again
    try:
        yield interrupts
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = report
