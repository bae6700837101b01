"""Stop a long command on SIGINT, SIGTERM or SIGHUP at a point where its work can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from wadi.errors import Interrupted
from wadi.parallel.ranks import Ranks

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):
    """Ends work that a stop makes pointless, such as the images of a preview. Raised by `Stop.raise_if_requested`."""


@dataclass
class Stop:
    """A request to stop, made by a signal to any process of the run.

    Attributes:
        signal: the signal's number; None before one arrived, or before the processes synchronised.
    """

    signal: int | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def synchronise(self) -> bool:
        """Return whether any process received a signal. Communicates: every process must call it at the same place."""
        self.signal = self.ranks.largest(self.signal or 0) or None
        return self.signal is not None

    def raise_if_requested(self) -> None:
        """Raise `Stopped` if any process received a signal. Communicates, as `synchronise`."""
        if self.synchronise():
            raise Stopped

    def interrupted(self, message: str) -> Interrupted:
        """Return the exception with which a command ends after a signal; ``message`` says whether the work is saved."""
        return Interrupted(self.signal or signal.SIGTERM, message)


@contextmanager
def stop_on_signals(ranks: Ranks | None = None) -> Iterator[Stop]:
    """Within the block SIGINT, SIGTERM and SIGHUP request a stop. A second SIGINT interrupts at once.

    A signal that is ignored stays ignored: ``nohup`` ignores SIGHUP, and a shell ignores SIGINT for background jobs.
    """
    stop = Stop(ranks=ranks or Ranks())
    terminals = [stream for stream in (0, 1, 2) if _is_terminal(stream)]

    def request(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number not in (signal.SIGINT, signal.SIGTERM):
            _close_terminals(terminals)
        stop.signal = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request)
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


def _close_terminals(terminals: list[int]) -> None:
    """Redirect streams of a terminal that hung up to nowhere. Writing to it would fail before anything is saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
