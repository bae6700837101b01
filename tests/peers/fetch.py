"""PEFT's own tests, of exactly the installed version, from its source distribution on the package index."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peft-tests"
PACKAGE = "peft_tests"


class FetchError(RuntimeError):
    """The source distribution could not be fetched or holds no tests."""


def fetch() -> Path:
    """The folder that holds the package ``peft_tests``; downloaded on first use, then found in the cache.

    Raises:
        FetchError: the package index cannot be reached, or has no such source distribution.
    """
    home = CACHE / version("peft")
    if not (home / PACKAGE / "__init__.py").exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
            _unpack(_download(Path(scratch)), Path(scratch) / "home")
            shutil.rmtree(home, ignore_errors=True)
            (Path(scratch) / "home").rename(home)
    return home


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", "peft", "--dest", str(folder), f"peft=={version('peft')}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    archives = list(folder.glob("peft-*.tar.gz"))
    if done.returncode or not archives:
        raise FetchError(f"pip download of peft's source distribution failed: {done.stderr.strip()[-500:]}")
    return archives[0]


def _unpack(archive: Path, home: Path) -> None:
    tests = home / PACKAGE
    tests.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (tests / parts[2]).write_bytes(tar.extractfile(member).read())
    if not list(tests.glob("test_*.py")):
        raise FetchError(f"{archive.name} holds no tests")
    (tests / "__init__.py").touch()
