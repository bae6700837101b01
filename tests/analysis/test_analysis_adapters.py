"""Students with an adapter of any method are analysed as their merged weights are."""

import pytest
import torch

from raising import raises_naming
from wadi import roles
from wadi.analysis.analyze import analyze
from wadi.analysis.sources import open_student, open_teacher
from wadi.backbones import load_pipeline
from wadi.cli.main import main
from wadi.roles import methods

LAYERS = r".*(attn\d\.to_(q|out\.0)|ff\.net\.2)"
KERNELS = r".*(attn1\.to_q|conv1)"
OPTIONS = {"oft": {"oft_block_size": 4}, "boft": {"boft_block_size": 4}, "road": {"group_size": 8}}


def student(sd_folder, folder, method, targets):
    """Write an adapter whose parameters are all disturbed. Return the state dict of its merged network."""
    unet = load_pipeline(sd_folder).unet
    config = methods.adapter_config(method, "student", 2, OPTIONS.get(method, {}), targets)
    roles.attach(unet, "student", config, methods.method(method).frozen)
    with torch.no_grad():
        for parameter in roles.parameters(unet, "student").values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    roles.save(unet, "student", folder)
    return roles.fuse(unet, "student").state_dict()


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_weights_of_a_student_are_those_that_fusing_gives(method, sd_folder, tmp_path):
    merged = student(sd_folder, tmp_path / "student", method, LAYERS if method in ("oft", "road") else KERNELS)
    teacher = open_teacher(str(sd_folder))
    after = open_student(str(tmp_path / "student"), teacher)
    assert set(after) == set(merged)
    for name, value in merged.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5)
    changed = [name for name in merged if not torch.equal(after[name], teacher[name])]
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name in changed}
    assert layers == {
        layer.name for layer in analyze(str(sd_folder), str(tmp_path / "student")).layers if layer.direction_mean > 1e-9
    }


def test_the_command_analyses_a_lora_student_and_names_what_does_not_fit(sd_folder, sd_v_folder, tmp_path, capsys):
    student(sd_folder, tmp_path / "student", "lora", LAYERS + "|.*proj_in")
    assert main(["analyze", str(sd_folder), str(tmp_path / "student"), "--out", str(tmp_path / "out")]) == 0
    assert "direction change" in (tmp_path / "out" / "analysis.md").read_text()
    capsys.readouterr()
    with raises_naming("proj_in"):  # a convolution in one teacher, linear in the other
        analyze(str(sd_v_folder), str(tmp_path / "student"))
