"""Check an error by its type and by the values that it names. The wording of the message is free."""

from contextlib import contextmanager

import pytest

from wadi.errors import WadiError


@contextmanager
def raises_naming(*values, error=WadiError):
    """Require ``error`` within the block, with a message that contains each of ``values``; a `WadiError` has one line.

    Values are wrong inputs, files, options, counts. Yields pytest's information about the error.
    """
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert error is not WadiError or "\n" not in message
    missing = [value for value in map(str, values) if value not in message]
    assert not missing, f"{message!r} does not name {missing}"
