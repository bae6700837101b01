"""Check errors by the values that they name, so that their wording is free."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from wadi.errors import WadiError


@contextmanager
def error_naming(*values: object) -> Iterator[pytest.ExceptionInfo[WadiError]]:
    """Expect a `WadiError` whose message contains each of ``values``: the input that is wrong, a file, an option, a count."""
    with pytest.raises(WadiError) as caught:
        yield caught
    message = str(caught.value)
    absent = [value for value in map(str, values) if value not in message]
    assert not absent, f"{absent} not named in: {message}"
