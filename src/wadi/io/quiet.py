"""Turn off the progress bars, advice and warnings of other libraries, so that the terminal shows only our own output."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The libraries read these when they are imported. A value that the user has set stays.
SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # diffusers imports ONNX Runtime if it is installed, which warns if there is no home folder
}


def quiet_libraries() -> None:
    """Turn off the bars and warnings of all libraries until this process ends.

    Errors are still printed, and so is the diffusers message about a prompt that is too long. ``python -W`` and
    ``PYTHONWARNINGS`` turn warnings on again.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def errors_only(*libraries: str) -> Iterator[None]:
    """Turn off log messages below "error", and progress bars, within the block. Errors still raise.

    Args:
        libraries: ``"diffusers"``, ``"transformers"``; both unless given.
    """
    logs = [importlib.import_module(f"{name}.utils.logging") for name in libraries or ("diffusers", "transformers")]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            (log.enable_progress_bar if bars else log.disable_progress_bar)()
