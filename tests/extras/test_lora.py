"""An adapter of the teacher on its student: by weight, whole or not at all, and no key is lost in silence."""

import json

import pytest
import torch
from onestep import randomise
from safetensors.torch import load_file, save_file

import tiny
from wadi import roles
from wadi.backbones import load_pipeline
from wadi.errors import WadiError
from wadi.extras.lora import merge
from wadi.extras.lora.merge import apply_lora
from wadi.lorad import LoRaDConfig
from wadi.pipelines.generate import load

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
    randomise(merge.attach(pipeline.unet, 3, TARGETS), 0.3)
    folder = tmp_path_factory.mktemp("lora")
    merge.write(pipeline, folder)
    return folder


@pytest.fixture(scope="module")
def lorad_folder(sd_folder, tmp_path_factory):
    """A LoRaD adapter of the same layers."""
    network = load_pipeline(sd_folder).unet
    roles.attach(network, merge.NAME, LoRaDConfig(r=3, target_modules=TARGETS))
    randomise(roles.parameters(network, merge.NAME).values(), 0.5)
    folder = tmp_path_factory.mktemp("lorad") / "adapter"
    roles.save(network, merge.NAME, folder)
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


def expected_change(folder):
    """``B A`` by layer, straight from the file."""
    tensors = load_file(folder / merge.FILE)
    layers = {key.split(".lora_")[0] for key in tensors}
    found = {}
    for layer in layers:
        A, B = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        product = (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])
        found[layer.removeprefix("unet.") + ".weight"] = product
    return found


# --- laws -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.4, -1.5])
def test_a_lora_adds_its_product(sd_folder, lora_folder, scale):
    pipeline = load_pipeline(sd_folder)
    before = weights(pipeline)
    layers = apply_lora(pipeline, lora_folder / merge.FILE, scale)
    wanted, after = expected_change(lora_folder), weights(pipeline)
    assert changed(before, after) == wanted.keys()
    assert layers == len(wanted)
    for name, change in wanted.items():
        torch.testing.assert_close(after[name], before[name] + scale * change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora_folder", "lorad_folder"])
def test_scale_zero_is_no_change_to_the_bit(sd_folder, kind, request):
    pipeline = load_pipeline(sd_folder)
    before = weights(pipeline)
    assert apply_lora(pipeline, request.getfixturevalue(kind), 0.0) > 0
    assert changed(before, weights(pipeline)) == set()


@pytest.mark.parametrize("kind", ["lora_folder", "lorad_folder"])
def test_what_is_left_is_an_ordinary_pipeline(sd_folder, kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    pipeline = load_pipeline(sd_folder)
    apply_lora(pipeline, folder)
    once = weights(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    assert changed(once, weights(load_pipeline(tmp_path / "saved"))) == set()
    apply_lora(pipeline, folder, -1.0)  # and a second one can follow: here the first one's opposite
    plain = weights(load_pipeline(sd_folder))
    assert changed(plain, once)
    for name, tensor in weights(pipeline).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-5)


def test_angles_add_whatever_the_order(sd_folder, student_folder, lorad_folder):
    """LoRaD on the student is the student's rotation of the customised teacher."""
    on_student = load(adapter=student_folder)
    apply_lora(on_student, lorad_folder)
    teacher = load_pipeline(sd_folder)
    apply_lora(teacher, lorad_folder)
    roles.load(teacher.unet, student_folder, "student")
    roles.fuse(teacher.unet, "student")
    one, other = weights(on_student), weights(teacher)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_a_lora_can_be_turned_with_the_students_weight(sd_folder, student_folder, lora_folder):
    """``rot(W + dW, theta_s)``: the customised teacher under the student's angles; plain addition is another thing."""
    turned, plain = load(adapter=student_folder), load(adapter=student_folder)
    apply_lora(turned, lora_folder, 0.8, student=student_folder)
    apply_lora(plain, lora_folder, 0.8)
    teacher = load_pipeline(sd_folder)
    apply_lora(teacher, lora_folder, 0.8)
    roles.load(teacher.unet, student_folder, "student")
    roles.fuse(teacher.unet, "student")
    wanted, other = weights(teacher), weights(plain)
    for name, tensor in weights(turned).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)
    both = KEY.removeprefix("unet.") + ".weight"
    assert (other[both] - wanted[both]).abs().max() > 0.05
    only_lora = both.replace("to_q", "to_v")  # no angles of the student there: the two agree
    torch.testing.assert_close(other[only_lora], wanted[only_lora], rtol=1e-5, atol=1e-5)


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


def refused(pipeline, file, *argv, **kwargs):
    """The error's text; the pipeline is as it was, and still takes an adapter."""
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
    assert "from -4 to 4" in refused(pipeline, lora_folder, scale)


def test_a_lora_of_another_base_names_its_keys(pipeline, lora_folder, tmp_path):
    tensors = load_file(lora_folder / merge.FILE)
    file = tmp_path / "other.safetensors"
    save_file({key.replace("down_blocks.1.", "down_blocks.7."): value for key, value in tensors.items()}, file)
    assert "unet.down_blocks.7.attentions.0" in refused(pipeline, file)
    save_file({key.replace("unet.", "transformer."): value for key, value in tensors.items()}, file)
    said = refused(pipeline, file)
    assert f"{len(tensors)} keys that fit no layer" in said
    assert "transformer." in said
    wider = {key: torch.zeros(len(value), 48) if key == f"{KEY}.lora_A.weight" else value for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in wider.items()}, file)
    said = refused(pipeline, file)
    assert "1 of another shape" in said
    assert f"{KEY}.lora_A.weight" in said


def test_a_pipeline_of_another_width_names_the_shape(lora_folder, lorad_folder, tmp_path):
    other = tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 64))
    assert "of another shape" in refused(other, lora_folder)
    assert "of another shape" in refused(other, lorad_folder)


def test_files_that_are_no_lora(pipeline, lora_folder, tmp_path):
    assert "does not exist" in refused(pipeline, tmp_path / "none.safetensors")
    pickled = tmp_path / "style.ckpt"
    pickled.write_bytes(b"\x80\x04")
    assert "convert it" in refused(pipeline, pickled)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((lora_folder / merge.FILE).read_bytes()[:500])
    assert "damaged" in refused(pipeline, torn)
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refused(pipeline, tmp_path / "empty")


def test_a_students_own_adapter_is_no_customisation(student_folder, lora_folder, tmp_path):
    pipeline = load(adapter=student_folder)
    assert "--adapter" in refused(pipeline, student_folder)
    assert json.loads((student_folder / "wadi.json").read_text())["timestep"] == 800
    other = tiny.stable_diffusion(tmp_path / "parts", block_out_channels=(16, 64))
    assert "does not fit" in refused(other, _of(other, tmp_path), student=student_folder)


def _of(pipeline, folder):
    """A LoRA of this very pipeline."""
    randomise(merge.attach(pipeline.unet, 2, r".*to_q"), 0.1)
    merge.write(pipeline, folder / "own")
    pipeline.unload_lora_weights()
    return folder / "own"
