"""The analysis of the embedded student, which has no run's folder: computed in seconds when it is first looked at."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

from wadi.app.live import results_html
from wadi.zoo.paths import NAME


@functools.cache
def embedded_html() -> str:
    """Return the tables and figures of ``wadi analyze zoo zoo``."""
    from wadi.analysis import write
    from wadi.analysis.analyze import analyze

    with TemporaryDirectory(prefix="wadi-app-") as folder:
        out = Path(folder) / "analysis"
        out.mkdir()
        write.write(analyze(NAME, NAME, 4096), out)
        return results_html(Path(folder))
