"""`wadi.testing` is part of the package: its parts work without pytest, and its tests show what fails and in which layer."""

import importlib.util
import subprocess
import sys

import pytest

import wadi.testing
from raising import raises_naming
from wadi.testing.conformance import assert_same_layers


def test_the_parts_do_not_import_pytest():
    code = "import sys, wadi.testing.components as parts; parts.t5(); print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_without_pytest_the_tests_say_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else found(name))
    with raises_naming("Conformance", "pip install pytest"):
        _ = wadi.testing.Conformance
    with pytest.raises(AttributeError, match="nothing_else"):
        _ = wadi.testing.nothing_else


def test_a_difference_of_layers_names_them():
    assert_same_layers(["a", "b"], {"b", "a"}, "x")
    with pytest.raises(AssertionError, match=r"the fake model: missing \['b'\]; not expected \['c'\]"):
        assert_same_layers(["a", "c"], ["a", "b"], "the fake model")


FAMILY_TEST = """
import pytest, torch
from diffusers import SanaPipeline
from torch import nn
from wadi.backbones import Backbone, family, register_family
from wadi.testing import Conformance, Family
import small_pipelines

class Scaled(family("SanaPipeline")):
    def predict(self, x_t, t, condition):
        return super().predict(x_t, t / 2, condition)

class ScaledPipeline(SanaPipeline):
    pass

register_family("ScaledPipeline", Scaled)

@pytest.fixture(scope="session")
def family(tmp_path_factory):
    parts = small_pipelines.make("sana", tmp_path_factory.mktemp("parts")).components
    return Family(ScaledPipeline(**parts), adapted=lambda n, m: True, fake=lambda n, m: isinstance(m, nn.Linear), last=1000)

class TestScaled(Conformance):
    pass
"""


def test_a_wrong_family_fails_the_laws_that_it_breaks(tmp_path):
    """A timestep scaled twice, and a wrong statement about the layers."""
    (tmp_path / "test_scaled.py").write_text(FAMILY_TEST)
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    laws = "one_step or feeds or layers or predictions"
    words = [sys.executable, "-c", code, "-q", "--no-header", "-p", "no:cacheprovider", "-k", laws, str(tmp_path)]
    out = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path).stdout
    failed = {line.split("::")[-1].split(" ")[0] for line in out.splitlines() if line.startswith("FAILED")}
    assert failed == {
        "test_one_step_is_the_pipelines_own[False]",
        "test_one_step_is_the_pipelines_own[True]",
        "test_training_feeds_the_network_what_a_plain_call_does",
        "test_adapters_land_on_the_documented_layers",
    }, out
    assert "timestep: Tensor-likes are not close" in out
    assert "adapter of the student: missing ['patch_embed.proj'" in out
