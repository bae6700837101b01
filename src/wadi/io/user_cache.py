"""The folder in which the package keeps files between runs: digests, image features and downloads."""

from __future__ import annotations

import os
from pathlib import Path

from wadi.errors import WadiError


def cache_folder() -> Path:
    """Return ``$WADI_CACHE`` if it is set, else ``$XDG_CACHE_HOME/wadi``, else ``~/.cache/wadi``.

    Raises:
        WadiError: if none of the three exists, because this user has no home folder.
    """
    if chosen := os.environ.get("WADI_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wadi"
    except RuntimeError as error:  # no HOME, and no entry for this user
        raise WadiError("This user has no home folder to cache files in. Set WADI_CACHE to a folder.") from error
