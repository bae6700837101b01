"""Adapters of the teacher on its student: what changes in the weights, and that a bad file changes nothing."""

import json

import pytest
import torch
from onestep import randomise
from safetensors.torch import load_file, save_file

import tiny
from wadi import roles
from wadi.backbones import load_pipeline
from wadi.errors import WadiError
from wadi.extras.lora import ADAPTER_NAME
from wadi.extras.lora.apply import apply_lora
from wadi.extras.lora.file import LORA_FILE
from wadi.extras.lora.training import attach_lora, write_lora
from wadi.lorad import LoRaDConfig
from wadi.pipelines.load import load

TARGETS = r".*(to_q|to_v|ff\.net\.2|conv1)"
KEY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def weights(pipeline):
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def lora_folder(sd_folder, tmp_path_factory):
    """A LoRA on attention, feed-forward and convolutions of the tiny teacher, as diffusers writes it."""
    pipeline = load_pipeline(sd_folder)
    randomise(attach_lora(pipeline.unet, 3, TARGETS), 0.3)
    folder = tmp_path_factory.mktemp("lora")
    write_lora(pipeline, folder)
    return folder


@pytest.fixture(scope="module")
def lorad_folder(sd_folder, tmp_path_factory):
    """A LoRaD adapter of the same layers."""
    network = load_pipeline(sd_folder).unet
    roles.attach(network, ADAPTER_NAME, LoRaDConfig(r=3, target_modules=TARGETS))
    randomise(roles.parameters(network, ADAPTER_NAME).values(), 0.5)
    folder = tmp_path_factory.mktemp("lorad") / "adapter"
    roles.save(network, ADAPTER_NAME, folder)
    return folder


@pytest.fixture(scope="module")
def student_folder(sd_folder, tmp_path_factory):
    """A student's adapter of large angles, on attention and convolutions."""
    network = load_pipeline(sd_folder).unet
    roles.attach(network, "student", LoRaDConfig(r=4, target_modules=r".*(to_q|to_k|ff\.net\.2|conv1)"))
    randomise(roles.parameters(network, "student").values(), 0.7)
    folder = tmp_path_factory.mktemp("student") / "student"
    roles.save(network, "student", folder, extra={"timestep": 800, "teacher": str(sd_folder)})
    return folder


def expected_changes(folder):
    """``B A`` by layer, straight from the file."""
    tensors = load_file(folder / LORA_FILE)
    layers = {key.split(".lora_")[0] for key in tensors}
    changes = {}
    for layer in layers:
        A, B = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        product = (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])
        changes[layer.removeprefix("unet.") + ".weight"] = product
    return changes


# --- laws -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.4, -1.5])
def test_a_lora_adds_its_product(sd_folder, lora_folder, scale):
    pipeline = load_pipeline(sd_folder)
    before = weights(pipeline)
    layers = apply_lora(pipeline, lora_folder / LORA_FILE, scale)
    expected, after = expected_changes(lora_folder), weights(pipeline)
    assert changed(before, after) == expected.keys()
    assert layers == len(expected)
    for name, change in expected.items():
        torch.testing.assert_close(after[name], before[name] + scale * change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora_folder", "lorad_folder"])
def test_scale_zero_changes_no_bit(sd_folder, kind, request):
    pipeline = load_pipeline(sd_folder)
    before = weights(pipeline)
    assert apply_lora(pipeline, request.getfixturevalue(kind), 0.0) > 0
    assert changed(before, weights(pipeline)) == set()


@pytest.mark.parametrize("kind", ["lora_folder", "lorad_folder"])
def test_the_result_is_an_ordinary_pipeline(sd_folder, kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    pipeline = load_pipeline(sd_folder)
    apply_lora(pipeline, folder)
    once = weights(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    assert changed(once, weights(load_pipeline(tmp_path / "saved"))) == set()
    apply_lora(pipeline, folder, -1.0)  # a second one can follow: here it undoes the first
    plain = weights(load_pipeline(sd_folder))
    assert changed(plain, once)
    for name, tensor in weights(pipeline).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5)


def test_angles_add_in_any_order(sd_folder, student_folder, lorad_folder):
    """LoRaD on the student gives the student's rotation of the customised teacher."""
    on_student = load(adapter=student_folder)
    apply_lora(on_student, lorad_folder)
    teacher = load_pipeline(sd_folder)
    apply_lora(teacher, lorad_folder)
    roles.load(teacher.unet, student_folder, "student")
    roles.fuse(teacher.unet, "student")
    one, other = weights(on_student), weights(teacher)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_a_lora_can_be_rotated_with_the_students_weight(sd_folder, student_folder, lora_folder):
    """``rot(W + dW, theta_s)``: the student's angles on the customised teacher. Plain addition differs."""
    rotated, plain = load(adapter=student_folder), load(adapter=student_folder)
    apply_lora(rotated, lora_folder, 0.8, student=student_folder)
    apply_lora(plain, lora_folder, 0.8)
    teacher = load_pipeline(sd_folder)
    apply_lora(teacher, lora_folder, 0.8)
    roles.load(teacher.unet, student_folder, "student")
    roles.fuse(teacher.unet, "student")
    expected, added = weights(teacher), weights(plain)
    for name, tensor in weights(rotated).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    both = KEY.removeprefix("unet.") + ".weight"
    assert (added[both] - expected[both]).abs().max() > 0.05
    only_lora = both.replace("to_q", "to_v")  # the student has no angles there, so the two agree
    torch.testing.assert_close(added[only_lora], expected[only_lora], rtol=1e-5, atol=1e-5)


def test_kohyas_names_and_alpha(sd_folder, tmp_path):
    generator = torch.Generator().manual_seed(3)
    A, B = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    kohya = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    file = tmp_path / "style.safetensors"
    save_file(
        {f"{kohya}.lora_down.weight": A, f"{kohya}.lora_up.weight": B, f"{kohya}.alpha": torch.tensor(1.0)},
        file,
        metadata={"format": "pt"},
    )
    pipeline = load_pipeline(sd_folder)
    before = weights(pipeline)
    assert apply_lora(pipeline, file, 0.5) == 1
    after, name = weights(pipeline), KEY.removeprefix("unet.") + ".weight"
    assert changed(before, after) == {name}
    torch.testing.assert_close(after[name], before[name] + 0.5 * (1 / 2) * B @ A, rtol=1e-5, atol=1e-5)


# --- bad input ----------------------------------------------------------------------------------------------------------------


def error_of(pipeline, file, *argv, **kwargs):
    """Return the error's text. Check that the pipeline is unchanged and still takes an adapter."""
    before = weights(pipeline)
    with pytest.raises(WadiError) as error:
        apply_lora(pipeline, file, *argv, **kwargs)
    assert changed(before, weights(pipeline)) == set()
    assert getattr(pipeline.unet, "peft_config", None) in (None, {})
    roles.refuse_adapted(pipeline.unet)
    return str(error.value)


@pytest.fixture
def pipeline(sd_folder):
    return load_pipeline(sd_folder)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 4.1, -7.0])
def test_scales_out_of_range(pipeline, lora_folder, scale):
    assert str(scale) in error_of(pipeline, lora_folder, scale)


def test_a_lora_of_another_base_names_its_keys(pipeline, lora_folder, tmp_path):
    tensors = load_file(lora_folder / LORA_FILE)
    file = tmp_path / "other.safetensors"
    save_file({key.replace("down_blocks.1.", "down_blocks.7."): value for key, value in tensors.items()}, file)
    assert "unet.down_blocks.7.attentions.0" in error_of(pipeline, file)
    save_file({key.replace("unet.", "transformer."): value for key, value in tensors.items()}, file)
    message = error_of(pipeline, file)
    assert f"{len(tensors)} keys" in message
    assert min(tensors).replace("unet.", "transformer.") in message
    wider = {key: torch.zeros(len(value), 48) if key == f"{KEY}.lora_A.weight" else value for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in wider.items()}, file)
    assert f"{KEY}.lora_A.weight" in error_of(pipeline, file)


def test_a_pipeline_of_another_width_names_the_shape(lora_folder, lorad_folder, tmp_path):
    other = tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 64))
    assert "unet.down_blocks.1.attentions.0" in error_of(other, lora_folder)
    message = error_of(other, lorad_folder)
    assert str(lorad_folder) in message
    assert "down_blocks.1.attentions.0" in message


def test_files_that_are_not_a_lora(pipeline, lora_folder, tmp_path):
    assert "none.safetensors" in error_of(pipeline, tmp_path / "none.safetensors")
    pickled = tmp_path / "style.ckpt"
    pickled.write_bytes(b"\x80\x04")
    assert "style.ckpt" in error_of(pipeline, pickled)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((lora_folder / LORA_FILE).read_bytes()[:500])
    assert "torn.safetensors" in error_of(pipeline, torn)
    (tmp_path / "empty").mkdir()
    message = error_of(pipeline, tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    assert LORA_FILE in message


def test_a_students_own_adapter_is_not_applied_to_it_again(student_folder, lora_folder, tmp_path):
    pipeline = load(adapter=student_folder)
    assert "--adapter" in error_of(pipeline, student_folder)
    assert json.loads((student_folder / "wadi.json").read_text())["timestep"] == 800
    other = tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 64))
    message = error_of(other, _lora_of(other, tmp_path), student=student_folder)
    assert str(student_folder) in message
    assert "down_blocks.1" in message


def _lora_of(pipeline, folder):
    """Write a LoRA that fits ``pipeline``."""
    randomise(attach_lora(pipeline.unet, 2, r".*to_q"), 0.1)
    write_lora(pipeline, folder / "own")
    pipeline.unload_lora_weights()
    return folder / "own"
