"""``wadi.distill`` is a function of the public API and the name of a package: both work, whichever is used first."""

import pytest

import wadi
from wadi.distill.config import DistillConfig


def test_the_package_can_be_called_like_the_function(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("wadi.distill.loop.distill", lambda config: calls.append(config) or tmp_path)
    config = DistillConfig(teacher="zoo", prompts="zoo", out=str(tmp_path))
    assert wadi.distill(config) == tmp_path
    assert calls == [config]


def test_other_attributes_stay_those_of_a_package():
    with pytest.raises(AttributeError, match="nothing"):
        wadi.distill.nothing  # noqa: B018
