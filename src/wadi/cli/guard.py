"""Turn every failure of a command into one line and an exit code.

2 = bad input. 1 = an unexpected failure, also one inside a library; ``--debug`` (or ``WADI_DEBUG=1``) prints its traceback.
130 = Ctrl-C. 143 and 129 = SIGTERM and SIGHUP; a command that can be continued has saved its state. 141 = the reader of
standard output ended first (``| head``).
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
PATH_ERRORS = (  # the system does not let us use a path
    *FULL, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ESTALE,
    errno.ENXIO,
)  # fmt: skip
LONGEST = 400  # characters that are shown of a library's message


def split_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without ``--debug`` (up to ``--``), and whether it or ``WADI_DEBUG`` was given."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    kept = [word for word in arguments[:end] if word != "--debug"]
    return [*kept, *arguments[end:]], len(kept) < end or os.environ.get("WADI_DEBUG", "") not in ("", "0")


def guard(command: str, act: Callable[[], int], debug: bool = False) -> int:
    """Run ``act`` and return its exit code; print one line on stderr for any error and return the code for it.

    `SystemExit` passes: the parser ends with it after ``--help``.
    """
    with _interrupts() as interrupts:
        try:
            code = act()
            _flush()
        except KeyboardInterrupt:
            interrupts.received, code = True, INTERRUPTED
        except BrokenPipeError:
            return _broken_pipe()
        except Interrupted as stopped:
            return _report(stopped, str(stopped), debug, 128 + stopped.signal)
        except WadiError as error:
            code = _report(error, str(error), debug, BAD_INPUT)
        except Exception as error:
            code = _unexpected(command, error, debug)
    # Some libraries swallow the interrupt while they are imported.
    if interrupts.received and code in (0, INTERRUPTED):
        print("wadi: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


def check_decodable(arguments: Sequence[str]) -> None:
    """Raise `WadiError` for an argument that is not UTF-8. Python keeps its bytes as surrogates, which cannot be written."""
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
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and (error.filename is not None or error.errno in FULL):
        where = "" if error.filename is None else f" ({str(error.filename)[:100]!r})"
        return _report(error, f"{command}: {error.strerror}{where}. Give another path.", debug, BAD_INPUT)
    reason = " ".join(str(error).split()) or "no message"
    if _out_of_memory(error):
        line = (
            f"{command} ran out of memory in {_place(error)}: {reason[:LONGEST].rstrip('.')}. Use a smaller batch or size, or "
            "--dtype bfloat16."
        )
        return _report(error, line, debug, BAD_INPUT)
    line = (
        f"{command} failed unexpectedly in {_place(error)}: {type(error).__name__}: {reason[:LONGEST].rstrip('.')}. "
        "This is a bug: please report it, with the traceback that the same command prints with --debug."
    )
    return _report(error, line, debug, FAILED)


def _out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. Errors of torch need no check if torch was not imported."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from wadi.parallel.device import out_of_memory

    return out_of_memory(error)


def _place(error: BaseException) -> str:
    """Return the innermost function of this package that the error passed through."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame.f_globals.get("__name__", "").split(".")[0] == "wadi"] or frames[-1:]
    if not ours:
        return "an unknown place"
    code = ours[-1].f_code
    return f"{ours[-1].f_globals.get('__name__')}.{getattr(code, 'co_qualname', code.co_name)}".replace(".<locals>", "")


def _report(error: BaseException, line: str, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exception(error)
    with suppress(OSError):  # stderr may be closed
        print(f"wadi: {' '.join(line.split())}", file=sys.stderr)
    return code


# --- standard output --------------------------------------------------------------------------------------------------------


def forgiving_output() -> None:
    """Write characters that the terminal's encoding lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _broken_pipe() -> int:
    """Send standard output to the null device, so that the flush at exit does not fail again."""
    with suppress(OSError, ValueError, AttributeError):  # it may be closed, or have no descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    return BROKEN_PIPE


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Interrupts:
    received: bool = False


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Within the block Ctrl-C raises `KeyboardInterrupt` and is remembered.

    Python drops an exception that a destructor raises. If that drops an interrupt, it is sent once more.
    """
    interrupts, plain_hook = _Interrupts(), sys.unraisablehook

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.received = True
        raise KeyboardInterrupt

    def send_again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.02, _thread.interrupt_main).start()
        else:
            plain_hook(dropped)

    install = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if install:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = send_again
    try:
        yield interrupts
    finally:
        if install:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = plain_hook
