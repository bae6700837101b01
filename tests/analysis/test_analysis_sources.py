"""All forms of a network give the same analysis, bad input is named, and memory is that of one layer."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raising import raises_naming
from wadi import roles
from wadi.analysis.analyze import analyze
from wadi.analysis.sources import AdaptedNetwork, open_student, open_teacher
from wadi.backbones.lazy_tensors import LazyTensors
from wadi.distill.plan.memory import LiveBytes
from wadi.lorad.rotation import Factor, pair_angles, rotate
from wadi.pipelines import load


def weights_of(pipeline):
    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def changed(sd_folder, tmp_path):
    """``changed(tensors -> None)``: the tiny pipeline's U-Net as a state dict, after a change in place."""

    def save(change):
        tensors = weights_of(sd_folder)
        change(tensors)
        path = tmp_path / "student.safetensors"
        save_file(tensors, path)
        return str(path)

    return save


# --- one student in every form ----------------------------------------------------------------------------------------------


def test_a_run_its_adapter_its_export_and_its_state_dict_are_one_student(finished_run, sd_folder, tmp_path):
    pipeline = load.load(finished_run)
    pipeline.save_pretrained(tmp_path / "export")
    shutil.copy(tmp_path / "export" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "plain.safetensors")
    forms = (finished_run, finished_run / "student", tmp_path / "export", tmp_path / "plain.safetensors")
    run, adapter, *merged = (analyze(str(sd_folder), str(form)) for form in forms)
    assert run.layers == adapter.layers
    assert len(run.adapted) > 20
    for other in merged:
        assert not other.adapted
        for one, two in zip(run.layers, other.layers, strict=True):
            assert (one.name, one.shape) == (two.name, two.shape)
            assert one.direction_mean == pytest.approx(two.direction_mean, rel=1e-4, abs=1e-14)
            assert max(one.norm_mean, two.norm_mean) < 1e-6  # LoRaD turns and nothing else
    moved = [layer for layer in run.layers if layer.direction_mean > 1e-9]
    assert {layer.name for layer in moved} <= {layer.name for layer in run.adapted}
    assert len(moved) > 10


def test_an_adapter_is_applied_as_the_layers_do(finished_run, sd_folder):
    teacher = open_teacher(str(sd_folder))
    student = open_student(str(finished_run), teacher)
    network = load.load(finished_run).unet.state_dict()
    assert list(student) == list(teacher)
    for name in student:
        assert torch.equal(student[name], network[name])


def test_the_embedded_student_goes_by_its_name():
    teacher = open_teacher("zoo")
    student = open_student("zoo", teacher)
    assert isinstance(student, AdaptedNetwork)
    layer = student.rotated_layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    assert layer.R.dtype == torch.float32
    torch.testing.assert_close(layer.R, rotate(layer.W, pair_angles([Factor(layer.factor.A, layer.factor.B, 1.0)])))
    assert student.rotated_layer("conv_in.weight") is None


def test_transformers_are_streamed_as_well(tmp_path):
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    ).to(torch.bfloat16)  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, tmp_path / "teacher.safetensors")
    tensors["transformer_blocks.1.attn2.to_k.weight"] = tensors["transformer_blocks.1.attn2.to_k.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "student.safetensors")
    found = analyze(str(tmp_path / "teacher.safetensors"), str(tmp_path / "student.safetensors"))
    (moved,) = [layer for layer in found.layers if layer.direction_mean]
    assert (moved.kind, moved.block) == ("cross-attention", "block 1")
    assert list(found.by("block")) == ["outside", "block 0", "block 1"]


# --- what cannot be compared ------------------------------------------------------------------------------------------------


def test_the_same_network_twice_has_no_change(sd_folder):
    found = analyze(str(sd_folder), str(sd_folder))
    assert found.mean("norm_mean") == found.mean("direction_std") == 0
    assert found.mean("energy_30") is None
    assert [found.only_in_teacher, found.only_in_student, found.reshaped, found.changed_elsewhere] == [[]] * 4


def test_layers_of_one_model_only_and_other_shapes_are_listed(sd_folder, changed):
    def change(tensors):
        tensors["conv_new.weight"] = torch.ones(2, 2)
        tensors["conv_in.weight"] = torch.ones(3, 3)
        del tensors["conv_out.weight"]
        tensors["conv_out.bias"] += 1
        tensors["time_embedding.linear_1.weight"] *= 2

    whole, found = analyze(str(sd_folder), str(sd_folder)), analyze(str(sd_folder), changed(change))
    assert found.only_in_student == ["conv_new.weight"]
    assert found.only_in_teacher == ["conv_out.weight"]
    assert found.reshaped == ["conv_in.weight"]
    assert found.changed_elsewhere == ["conv_out.bias"]
    assert len(found.layers) == len(whole.layers) - 2


def test_networks_of_two_families_are_an_error(sd_folder, tmp_path):
    names = [f"transformer_blocks.{i}.attn1.to_q.weight" for i in range(5)]
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "dit.safetensors")
    with raises_naming("5", "0", "transformer_blocks", tmp_path / "dit.safetensors"):
        analyze(str(sd_folder), str(tmp_path / "dit.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, sd_folder, changed):
    def change(tensors):
        tensors["conv_in.weight"][0, 0, 0, 0] = value

    with raises_naming("Student", "conv_in.weight", "in 1 of"):
        analyze(str(sd_folder), changed(change))


def test_quantised_weights_are_named(sd_folder, changed):
    with raises_naming("conv_in.weight", "torch.int8"):
        analyze(str(sd_folder), changed(lambda t: t.update({"conv_in.weight": t["conv_in.weight"].to(torch.int8)})))


def test_a_source_without_a_network_is_named_in_one_line(sd_folder, tmp_path):
    teacher = str(sd_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(weights_bytes(sd_folder)[:-7])
    (tmp_path / "pickled.bin").write_bytes(b"x")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text("teacher: x\n")
    for name in ("nowhere", "empty", "torn.safetensors", "pickled.bin", "young", "nowhere.safetensors"):
        with raises_naming(tmp_path / name):
            analyze(teacher, str(tmp_path / name))
    with raises_naming("Teacher", tmp_path / "nowhere"):
        analyze(str(tmp_path / "nowhere"), teacher)


def weights_bytes(pipeline):
    return (pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_an_adapter_cannot_be_the_teacher(finished_run, sd_folder):
    with raises_naming("Teacher", finished_run):
        analyze(str(finished_run), str(sd_folder))


def test_adapters_that_do_not_fit_are_named(finished_run, sd_folder, tmp_path):
    folder = shutil.copytree(finished_run / "student", tmp_path / "adapter")
    whole = load_file(folder / roles.WEIGHTS)
    first = next(key for key in whole if key.endswith("lorad_A"))
    layer = first.removeprefix("base_model.model.").removesuffix(".lorad_A")
    for named, change in (
        (layer, {first: whole[first][:-1].contiguous()}),
        ("nowhere", {"base_model.model.nowhere.lorad_A": whole[first].clone()}),
    ):
        save_file({**whole, **change}, folder / roles.WEIGHTS)
        with raises_naming(folder, named):
            analyze(str(sd_folder), str(folder))
    save_file({**whole, "base_model.model.conv_in.weight": torch.ones(2)}, folder / roles.WEIGHTS)
    with raises_naming(folder, "conv_in.weight"):
        analyze(str(sd_folder), str(folder))
    (folder / roles.CONFIG).write_text('{"peft_type": "IA3"}')
    with raises_naming("'IA3'"):
        analyze(str(sd_folder), str(folder))


# --- memory -----------------------------------------------------------------------------------------------------------------


def most_held(folder, layers, monkeypatch):
    torch.manual_seed(0)
    teacher = {f"transformer_blocks.{i}.attn1.to_q.weight": torch.randn(96, 128) for i in range(layers)}
    angles = {}
    for name in teacher:
        key = "base_model.model." + name.removesuffix(".weight")
        angles |= {f"{key}.lorad_A": 0.1 * torch.randn(96, 4), f"{key}.lorad_B": torch.randn(4, 64)}
    folder.mkdir()
    save_file(teacher, folder / "teacher.safetensors")
    save_file(angles, folder / roles.WEIGHTS)
    (folder / roles.CONFIG).write_text('{"peft_type": "LORAD"}')
    held, plain = LiveBytes(), LazyTensors.__getitem__

    def getitem(self, name):
        tensor = plain(self, name).clone()  # a mapped file's tensors all lie in the storage of the file
        held.show(tensor)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(LazyTensors, "__getitem__", getitem)
        with held:
            found = analyze(str(folder / "teacher.safetensors"), str(folder))
    assert len(found.adapted) == layers
    assert held.now < 4096  # nothing stays
    return held.peak


def test_memory_is_that_of_a_few_layers_however_many_there_are(tmp_path, monkeypatch):
    few, many = (most_held(tmp_path / str(count), count, monkeypatch) for count in (3, 24))
    layer = 96 * 128 * 4
    assert 2 * layer < few < 20 * layer  # two weights, and their float64 copies and differences
    assert many <= 1.01 * few
