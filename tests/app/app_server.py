"""A server of the page in a process of its own, as `wadi app` starts it."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import wadi

SOURCE = Path(wadi.__file__).parents[1]


@contextlib.contextmanager
def served(*arguments, cwd=None):
    """``wadi app ARGUMENTS`` on a free port; yields its address and the process."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "TMPDIR": str(cwd or "/tmp")}
    command = [sys.executable, "-m", "wadi", "app", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cwd)
    process.lines = []
    try:
        for line in process.stdout:
            process.lines.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("".join(process.lines))
        threading.Thread(target=lambda: process.lines.extend(process.stdout), daemon=True).start()
        yield found[0], process
    finally:
        process.terminate()
        process.wait(60)
