"""The finished run's student, loaded once for each file of tests."""

import pytest

from wadi.pipelines.load import load


@pytest.fixture(scope="module")
def pipeline(finished_run):
    return load(finished_run)
