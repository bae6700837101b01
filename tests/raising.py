"""Check that an error names the value that is wrong. The wording of the message is free."""

from contextlib import contextmanager

import pytest

from wadi.errors import WadiError


@contextmanager
def raises_naming(*values):
    """Require a `WadiError` within the block whose message is one line and contains each of ``values``."""
    with pytest.raises(WadiError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    missing = [value for value in map(str, values) if value not in message]
    assert not missing, f"{message!r} does not name {missing}"
