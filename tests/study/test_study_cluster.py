"""Studies on a Ray cluster: an address that does not answer, and a worker that is killed."""

import os
import signal
import socket
import sys
import threading
import time

import pytest
import yaml

from raising import raises_naming
from wadi.cli.main import main
from wadi.study.file import study_from
from wadi.study.run import run_study


@pytest.fixture
def study_file(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"base": {"preset": "demo"}, "grid": {"student.rank": [2]}, "seeds": [0]}))
    return file


def test_without_ray_the_error_says_what_to_install(study_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["study", str(study_file), "--out", str(tmp_path / "out"), "--address", "auto"]) == 2
    assert "wadi-onestep[study]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_faulty_study_is_reported_before_the_cluster_is_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = tmp_path / "study.yaml"
    file.write_text("base: {preset: demo}\nseeds: [0]\ngrid: {student.rank: [2, -7]}")
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "--address", "auto"]) == 2
    assert "-7" in capsys.readouterr().err


def closed_port():
    """Return a port at which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "nonsense", "10.0.0.1:99999999", "-1"])
def test_an_address_that_does_not_answer_is_named_and_leaves_no_folder(form, study_file, tmp_path, capsys):
    pytest.importorskip("ray")
    address = form.format(closed_port())
    assert main(["study", str(study_file), "--out", str(tmp_path / "out"), f"--address={address}"]) == 2
    error = capsys.readouterr().err
    assert address in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_something_that_is_no_cluster_is_named(study_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("wadi.study.ray_engine.LIMIT", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert main(["study", str(study_file), "--out", str(tmp_path / "out"), "--address", address]) == 2
    assert address in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_survives_a_killed_worker(contents, tmp_path, monkeypatch):
    """Two runs at once; the worker of one is killed after its first checkpoint, and its run continues from there."""
    pytest.importorskip("ray")
    from wadi.study.ray_engine import cluster

    contents |= {"seeds": [0], "analysis": False}
    contents["base"] |= {"steps": 16, "checkpoint_every": 4}
    study, out, killed = study_from(contents), tmp_path / "out", []

    def kill_worker():
        run = out / "runs" / "rank=2--seed-0"
        while not killed:
            time.sleep(0.1)
            if any(path.name > "step-0000000" for path in run.glob("checkpoints/step-*")):
                training = int((run / ".lock").read_text().split()[1])
                with open(f"/proc/{training}/stat") as stream:
                    worker = int(stream.read().rpartition(")")[2].split()[1])
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with cluster("local") as engine:
        thread = threading.Thread(target=kill_worker, daemon=True)
        thread.start()
        rows = run_study(study, out, engine, "cluster", lambda line: None)
    assert killed
    assert [row.status for row in rows] == ["done", "done"]
    assert [row.values["steps"] for row in rows] == [16, 16]
    assert "Continuing" in (out / "logs" / "rank=2--seed-0.log").read_text()
    with raises_naming("--cpus", 4096), cluster("local", cpus=4096):
        pass
