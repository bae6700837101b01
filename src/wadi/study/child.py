"""Run a ``wadi`` command that ends with the process that started it: ``python -m wadi.study.child PID WORDS``.

Without this, a killed study (or a killed worker of a cluster) would leave its training processes behind, and the continued
study would find their runs in use. Only Linux has such a request; elsewhere the command simply runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2); it stays in force over exec


def main(parent: int, words: list[str]) -> None:
    """Replace this process by ``wadi WORDS``, to be killed when the process ``parent`` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the request
            sys.exit(128 + signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, "-m", "wadi", *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
