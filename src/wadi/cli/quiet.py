"""A command's output is ours: libraries keep their progress bars, advice and deprecations to themselves."""

from __future__ import annotations

import os
import sys
import warnings

# Read by the libraries when they are imported. Whoever set one of them keeps the setting.
SETTINGS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


def quiet_libraries() -> None:
    """Turn off bars and warnings of libraries for this process; ``python -W`` and ``PYTHONWARNINGS`` turn warnings on again.

    Errors, and what diffusers remarks on a prompt that is too long, are still printed.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
