"""An export is uploaded through the Hub's API, here a local stand-in, and an adapter is loaded from it again."""

import numpy as np
import pytest
import yaml
from hub_server import stand_in
from PIL import Image

from raising import raises_naming
from wadi.cli.main import main
from wadi.exports import write
from wadi.exports.hub import check_can_push, push
from wadi.pipelines.generate import generate_images
from wadi.pipelines.load import load


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with stand_in(monkeypatch, tmp_path / "cache") as server:
        yield server


def export(run, out, *options, to="adapter"):
    return main(["export", str(run), "--to", to, "--out", str(out), "--images", "1", *options])


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def visibility(asked):
    """Return ``'private'`` or None; earlier versions of huggingface_hub ask with a boolean."""
    return "private" if asked.get("private") else asked.get("visibility")


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_exactly_the_files_of_the_export_are_uploaded(hub, finished_run, sd_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--base-name", "owner/teacher", "--licence", "mit"]
    assert export(finished_run, out, *options, "--push-to-hub", "me/mine") == 0
    assert f"{hub.address}/me/mine" in capsys.readouterr().out
    assert hub.repositories["me/mine"] == content(out)
    assert {"adapter_model.safetensors", "adapter_config.json", "wadi.json", "README.md"} <= hub.repositories["me/mine"].keys()
    assert visibility(hub.created[0]) is None  # the default of the owner
    expected = {"base_model": "owner/teacher", "license": "mit", "library_name": "peft", "pipeline_tag": "text-to-image"}
    data = front(hub.cards[0])
    assert {key: data[key] for key in expected} == expected
    assert data["tags"] == ["wadi", "one-step", "lorad"]
    # again into the same repository, and the adapter from the Hub, at a scale
    assert push(out, "me/mine") == f"{hub.address}/me/mine"
    seeds = ["red apple"], [1]
    local = generate_images(load(adapter=out, teacher=sd_folder), *seeds).images[0]
    downloaded = generate_images(load(adapter="me/mine", teacher=sd_folder), *seeds).images[0]
    assert np.array_equal(np.asarray(downloaded), np.asarray(local))
    resolved = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert resolved == {"adapter_model.safetensors", "adapter_config.json", "wadi.json"}  # nothing else, no pickle
    argv = ["generate", "red apple", "--adapter", "me/mine:1.0", "--teacher", str(sd_folder), "--seed", "1", "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "a.png")]) == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "a.png")).astype(int) - np.asarray(local)).max() <= 1


def test_private_repositories(hub, finished_run, tmp_path, capsys):
    assert export(finished_run, tmp_path / "out", "--push-to-hub", "me/secret", "--private", to="lora") == 0
    assert visibility(hub.created[0]) == "private"
    assert front(hub.cards[0])["tags"] == ["wadi", "one-step", "lora"]
    assert "base_model" not in front(hub.cards[0])  # the teacher is a folder
    hub.repositories["me/public"] = {}
    with raises_naming("me/public", "--private", tmp_path / "out"):
        push(tmp_path / "out", "me/public", private=True)
    assert not hub.repositories["me/public"]
    assert export(finished_run, tmp_path / "other", "--private") == 2
    assert "--push-to-hub" in capsys.readouterr().err


def test_what_cannot_be_pushed_stops_before_the_export(hub, finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(write, "export", lambda *_: pytest.fail("it was exported"))
    for name in ("mine", "a/b/c", "../x/y", "me/", "me/x y"):
        assert export(finished_run, tmp_path / "out", "--push-to-hub", name) == 2
        assert name in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert export(finished_run, tmp_path / "out", "--push-to-hub", "me/mine") == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises_naming("HF_HUB_OFFLINE", "me/mine"):
        check_can_push("me/mine")
    assert not (tmp_path / "out").exists()
    assert hub.requests == []


@pytest.mark.parametrize("broken", ["/create", "/preupload", "/commit"])
def test_after_an_error_of_the_server_the_export_is_there(broken, hub, finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.broken, out = broken, tmp_path / "out"
    assert export(finished_run, out, "--push-to-hub", "me/mine") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for value in ("me/mine", str(out), "500"):
        assert value in error
    assert {"README.md", "adapter_model.safetensors"} <= content(out).keys()
    assert not hub.repositories.get("me/mine")
    hub.broken = ""
    push(out, "me/mine")
    assert hub.repositories["me/mine"] == content(out)


def test_an_adapter_that_the_hub_does_not_have(hub, sd_folder):
    with raises_naming("me/nothing"):
        load(adapter="me/nothing", teacher=sd_folder)
    hub.repositories["me/pickle"] = {"adapter_model.bin": b"\x80\x04", "adapter_config.json": b'{"peft_type": "LORAD"}'}
    with raises_naming("adapter_model.safetensors"):
        load(adapter="me/pickle", teacher=sd_folder)
    assert not any("adapter_model.bin" in path for _, path in hub.requests)
