"""The built package works outside of the clone, installed without the network into an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``(wheel, sdist)``."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The interpreter of an environment with the wheel, and with this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(packages)
    # Editable installs are .pth files too, which are not read from a folder that a .pth file names.
    (packages / "others.pth").write_text("\n".join(place for place in sys.path if place.endswith("site-packages")))
    return folder / "bin" / "python"


def run(python, *words, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_the_environment_has_the_wheel_and_not_the_clone(python, tmp_path):
    found = run(python, "-c", "import wadi; print(wadi.__file__)", cwd=tmp_path).stdout
    assert str(python.parents[1]) in found
    assert str(ROOT) not in found


def test_the_tests_of_families_are_in_it(python, tmp_path):
    code = (
        "from wadi.testing import Conformance, components; print(len([n for n in dir(Conformance) if n[:5] == 'test_']) > 20)"
    )
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr


def test_an_image_and_two_steps_of_distillation(python, tmp_path):
    drawn = run(python, "-m", "wadi", "generate", "red apple", "--out", "apple.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "apple.png").is_file()
    warm = [f"--warm-start.{name}=0" for name in ("pairs", "steps", "fake-steps", "weight")]
    settings = ["--steps=2", "--batch=2", '--sample-prompts=["pear"]', "--sample-seeds=1", "--teacher-steps=2", *warm]
    trained = run(python, "-m", "wadi", "distill", "--preset", "demo", "--out", "run", *settings, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "student" / "adapter_model.safetensors").is_file()


def test_the_source_package_has_what_its_tests_and_docs_need(built):
    with tarfile.open(built[1]) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    for needed in ("pyproject.toml", "constraints.txt", "Makefile", "tests/tiny.py", "docs/start.md", "mkdocs.yml", "LICENSE"):
        assert needed in names
    assert not any(name.startswith(("runs/", ".venv", "build/")) for name in names)
