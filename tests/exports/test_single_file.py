"""Checkpoint files are read back by diffusers' own converter, tensor for tensor."""

import json

import pytest
import small_exports
import torch
from safetensors.torch import load_file

from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.lorad import LoRaDConfig
from wadi.pipelines.load import load


def student(teacher, folder):
    backbone = from_pipeline(load_pipeline(teacher))
    roles.attach(backbone.network, "student", LoRaDConfig(r=2, target_modules=backbone.student_targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters(backbone.network, "student").values():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    roles.save(backbone.network, "student", folder, extra={"timestep": 800, "teacher": str(teacher)})
    return folder


@pytest.mark.parametrize("name", small_exports.MAKERS)
def test_diffusers_converts_every_tensor_back(name, tmp_path):
    import diffusers

    small_exports.MAKERS[name](tmp_path / "parts").save_pretrained(tmp_path / "teacher")
    adapter, out = student(tmp_path / "teacher", tmp_path / "adapter"), tmp_path / "out"
    argv = ["export", "--adapter", str(adapter), "--to", "single-file", "--out", str(out), "--images", "2"]
    assert main(argv) == 0
    record = json.loads((out / "export.json").read_text())
    assert record["check"]["equal"] == 2
    own = load(adapter=adapter)
    code = (out / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names = {"FOLDER": str(out), "prompt": "red apple", **vars(diffusers)}
    exec(code, names)
    read = names["pipe"]
    for component, model in own.components.items():
        if isinstance(model, torch.nn.Module):
            tensors = getattr(read, component).state_dict()
            expected = model.state_dict()
            assert tensors.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == []
    stored = load_file(out / "model.safetensors")
    for key in small_exports.KEYS[name]:
        assert key in stored
    texts = "".join(file.read_text() for file in out.rglob("*.json")) + (out / "README.md").read_text()
    assert str(tmp_path) not in texts


def test_families_without_such_a_layout_are_errors_that_say_what_can_hold_them(tmp_path, capsys):
    import small_pipelines

    small_pipelines.make("sana", tmp_path / "parts").save_pretrained(tmp_path / "sana")
    adapter = student(tmp_path / "sana", tmp_path / "adapter")
    argv = ["export", "--to", "single-file", "--images", "1", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main([*argv, "--adapter", str(adapter)]) == 2
    error = capsys.readouterr().err
    assert "SanaPipeline" in error
    assert "--to diffusers" in error
    assert main(argv) == 2  # the embedded student's network has a layer of its own
    error = capsys.readouterr().err
    assert "add_embedding" in error
    assert "--to diffusers" in error
    assert not (tmp_path / "out").exists()
