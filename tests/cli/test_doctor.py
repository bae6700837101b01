"""`wadi doctor`: what is installed, what is missing, and whether the folders of caches can be written."""

import json
from importlib.metadata import PackageNotFoundError

import pytest

from wadi.cli.main import main
from wadi.io import installation, outputs


def found(capsys):
    """``(exit code, findings)``."""
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def other_version(monkeypatch, package, version):
    """Let a package have another version; None = it is not installed."""
    plain = installation.installed_versions
    monkeypatch.setattr(
        installation, "installed_versions", lambda names: {n: version if n == package else v for n, v in plain(names).items()}
    )


def test_a_whole_installation_has_no_problem(capsys, cache):
    import torch

    code, findings = found(capsys)
    assert (code, findings["problems"]) == (0, [])
    assert findings["packages"]["torch"] == torch.__version__
    assert findings["devices"][0]["device"] == "cpu"
    assert findings["folders"]["the cache of wadi"]["path"] == str(cache)
    assert not cache.exists()  # looking leaves nothing behind
    assert main(["doctor"]) == 0
    assert str(cache) in capsys.readouterr().out


def test_a_missing_part_names_its_command_and_is_no_problem(capsys, monkeypatch):
    other_version(monkeypatch, "pyarrow", None)
    code, findings = found(capsys)
    assert code == 0
    assert findings["extras"]["data"] == {"pyarrow": None}
    assert main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["data"])
    assert "pyarrow" in line
    assert "wadi-onestep[data]" in line


def test_the_parts_of_a_part_are_resolved():
    extras = installation.read_installation().extras
    assert {package.name for package in extras["zoo"]} <= {package.name for package in extras["test"]}
    assert not any(package.name.startswith("wadi") for packages in extras.values() for package in packages)


@pytest.mark.parametrize(("version", "said"), [(None, "not installed"), ("2.1.0", "2.1.0")])
def test_a_required_package_that_is_missing_or_too_old_is_a_problem(capsys, monkeypatch, version, said):
    other_version(monkeypatch, "torch", version)
    code, findings = found(capsys)
    assert code == 2
    (problem,) = findings["problems"]
    assert said in problem
    assert "torch>=" in problem


def test_a_folder_that_cannot_be_written_is_a_problem(capsys, monkeypatch, cache):
    cache.write_text("a file")
    code, findings = found(capsys)
    assert code == 2
    assert str(cache) in findings["problems"][0]
    assert "WADI_CACHE" in findings["problems"][0]


def test_a_folder_of_someone_else_is_a_problem(capsys, monkeypatch, cache):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(outputs, "create_file", refused)
    code, findings = found(capsys)
    assert code == 2
    assert not findings["folders"]["the cache of wadi"]["writable"]


def test_a_copy_that_is_not_installed_says_so(capsys, monkeypatch):
    monkeypatch.setattr(installation, "metadata", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    code, findings = found(capsys)
    assert code == 2
    assert "pip install -e" in findings["problems"][0]
