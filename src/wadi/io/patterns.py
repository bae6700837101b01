"""Regular expressions from settings and files, matched within a time limit: a hostile one could otherwise run for ever."""

from __future__ import annotations

import time
from collections.abc import Sequence

from wadi.errors import WadiError

TIME_LIMIT = 2.0  # seconds


def matching_names(pattern: str, names: Sequence[str], setting: str) -> list[str]:
    """Return the names that a regular expression matches as a whole.

    Args:
        setting: name of the setting that holds the expression; error messages start with it.
    Raises:
        WadiError: if it is not a regular expression, or takes longer than `TIME_LIMIT`.
    """
    import regex

    try:
        compiled, end = regex.compile(pattern), time.monotonic() + TIME_LIMIT
        return [name for name in names if compiled.fullmatch(name, timeout=max(1e-3, end - time.monotonic()))]
    except TimeoutError as error:
        raise WadiError(
            f"{setting} is {pattern!r:.300}, which takes more than {TIME_LIMIT:g} seconds to match against the names of "
            f"{len(names)} layers. Write it without nested repetitions such as (a+)+."
        ) from error
    except (regex.error, RecursionError) as error:
        raise WadiError(
            f"{setting} is {pattern!r:.300}, which is not a regular expression: {error}. It must match whole names of layers."
        ) from error
