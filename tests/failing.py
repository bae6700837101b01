"""Expected errors: their type and the values that they name, whatever their wording."""

from contextlib import contextmanager

import pytest

from wadi.errors import WadiError


@contextmanager
def fails(*values, error=WadiError):
    """Expect the block to raise ``error`` with a message that contains each of ``values``; yields the error's information."""
    with pytest.raises(error) as caught:
        yield caught
    missing = [value for value in values if str(value) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
