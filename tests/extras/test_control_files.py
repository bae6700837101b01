"""ControlNets and IP-Adapters in the forms people have them, several at once, and errors for unusable files."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from test_control import condition_of, control_for, ip_adapter, loud, pixels, square, student, t2i_adapter

from raising import raises_naming
from wadi.errors import WadiError
from wadi.extras.control.load import load_control
from wadi.extras.control.network import controlnet_of
from wadi.extras.control.pipeline import arguments_of_several, control_arguments, with_control, with_controls

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return student("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    """The folder of a ControlNet for ``plain``."""
    folder = tmp_path_factory.mktemp("control") / "net"
    loud(controlnet_of(plain.unet, plain.vae_scale_factor)).save_pretrained(folder)
    return folder


def copied(saved, tmp_path, **config):
    folder = tmp_path / "net"
    shutil.copytree(saved, folder)
    if config:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def tensors_in(file):
    """Read, not mapped into memory: the tests write over the file."""
    return load(file.read_bytes())


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- ControlNets of all kinds -----------------------------------------------------------------------------------------------


def test_a_folder_with_fp16_weights_only(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")
    assert same(load_control(folder), load_control(saved))
    shutil.copy(folder / f"{STEM}.fp16.safetensors", folder / f"{STEM}.other.safetensors")
    with raises_naming("fp16", "other"):
        load_control(folder)


def test_a_single_file_with_its_config_next_to_it(saved, plain, tmp_path):
    folder = copied(saved, tmp_path)
    file = folder / "canny.safetensors"
    (folder / f"{STEM}.safetensors").rename(file)
    assert same(load_control(file), load_control(saved))
    args = control_arguments(with_control(plain, file), condition_of(plain))
    torch.testing.assert_close(pixels(with_control(plain, file), **args), pixels(with_control(plain, saved), **args))
    (folder / "config.json").unlink()
    with raises_naming("config.json"):
        load_control(file)
    save_file({"control_model.input_blocks.0.0.weight": torch.ones(2, 2)}, file)
    with raises_naming(file.name, "from_single_file"):
        load_control(file)


@pytest.mark.parametrize("name", ["control.pth", "control.ckpt", "control.bin"])
def test_pickles_are_named_and_never_loaded(name, saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / f"{STEM}.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/wadi-was-here'\ntR.")
    for place in (folder / name, folder):
        with raises_naming(name):
            load_control(place)


@pytest.mark.parametrize("as_file", [False, True])
def test_half_of_the_tensors_and_values_that_are_not_finite(as_file, saved, tmp_path):
    folder = copied(saved, tmp_path)
    file = folder / f"{STEM}.safetensors"
    tensors = tensors_in(file)
    place = file if as_file else folder
    save_file({name: value for i, (name, value) in enumerate(sorted(tensors.items())) if i % 2}, file)
    with raises_naming(-(-len(tensors) // 2), min(tensors)):
        load_control(place)
    name = "conv_in.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file)
    with raises_naming(name):
        load_control(place)
    save_file(tensors | {name: tensors[name].long()}, file)  # libraries would cast them
    with raises_naming("I64", name):
        load_control(place)
    if as_file:
        save_file(tensors | {"more.weight": torch.ones(2)}, file)
        with raises_naming("more.weight"):
            load_control(place)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": ["ControlNetModel"]}, "['ControlNetModel']"), ({"_class_name": None}, "None"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"), ({"block_out_channels": None}, "could not be loaded"),
        ({"block_out_channels": "wide"}, "could not be loaded"), ({"down_block_types": ["NoBlock"]}, "could not be loaded"),
    ],
)  # fmt: skip
def test_configs_of_something_else(config, named, saved, tmp_path):
    with pytest.raises(WadiError) as error:
        load_control(copied(saved, tmp_path, **config))
    assert named in str(error.value)


def test_a_config_that_is_no_object(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / "config.json").write_text("[" * 5000)
    with pytest.raises(WadiError):
        load_control(folder)


# --- several at once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_two_controlnets_add_up(name, tmp_path):
    base = student(name, tmp_path)
    nets = [control_for(name, base), control_for(name, base)]
    loud(nets[1], seed=5)
    with torch.no_grad():
        for parameter in nets[1].parameters():
            parameter.mul_(1.3)
    conditions = [condition_of(base), Image.new("RGB", condition_of(base).size, (90, 20, 200))]

    def generated(strengths):
        under = with_controls(base, nets)
        torch.manual_seed(0)
        return pixels(under, **arguments_of_several(under, conditions, strengths, [False] * 2, [None] * 2))

    both = generated([1.0, 0.7])
    alone = with_control(base, nets[0])
    torch.manual_seed(0)
    first = pixels(alone, **control_arguments(alone, conditions[0], 1.0))
    if name not in ("flux", "sd3"):  # their pipelines encode each condition with random numbers
        torch.testing.assert_close(generated([1.0, 0.0]), first, atol=1e-5, rtol=0)
    assert (both - generated([1.0, 0.0])).abs().mean() > 1e-5
    assert (both - generated([0.0, 0.7])).abs().mean() > 1e-5


def test_a_controlnet_and_an_image_prompt_in_either_order(saved, tmp_path):
    base = student("sd1", tmp_path)
    file = ip_adapter(tmp_path, base.unet)
    outs = []
    for order in ([saved, file], [file, saved]):
        under = with_controls(student("sd1", tmp_path), order)
        prompts = [one is file for one in order]
        conditions = [square(48) if prompt else condition_of(base) for prompt in prompts]
        outs.append(pixels(under, **arguments_of_several(under, conditions, [1.0, 1.0], prompts, [None, None])))
    assert torch.equal(*outs)


def test_what_cannot_be_combined(plain, saved, tmp_path):
    sana = student("sana", tmp_path / "sana")
    with raises_naming("SanaControlNetModel"):
        with_controls(sana, [control_for("sana", sana)] * 2)
    with raises_naming("T2IAdapter"):
        with_controls(plain, [t2i_adapter(), t2i_adapter()])
    with raises_naming("ControlNetModel", "T2IAdapter"):
        with_controls(plain, [saved, t2i_adapter()])
    file = ip_adapter(tmp_path, plain.unet)
    with raises_naming(2, file):
        with_controls(plain, [file, file])
    with raises_naming("T2I-Adapter", "IP-Adapter"):
        with_controls(plain, [t2i_adapter(), file])


def test_a_union_controlnet_of_flux_needs_its_mode(tmp_path):
    from diffusers import FluxControlNetModel

    base = student("flux", tmp_path)
    config = {**control_for("flux", base).config, "num_mode": 4}
    torch.manual_seed(0)
    union = loud(FluxControlNetModel(**{k: v for k, v in config.items() if not k.startswith("_")}))
    union.save_pretrained(tmp_path / "union")
    under = with_control(base, tmp_path / "union")
    conditions = condition_of(base)
    for mode in (None, -1, 4):
        with raises_naming(f"the mode is {mode}", "0 to 3"):
            control_arguments(under, conditions, mode=mode)
    outs = []
    for mode in (0, 2):
        torch.manual_seed(0)
        outs.append(pixels(under, **control_arguments(under, conditions, mode=mode)))
    assert not torch.equal(*outs)
    with raises_naming("mode 1"):
        control_arguments(with_control(base, control_for("flux", base)), conditions, mode=1)


# --- IP-Adapters ------------------------------------------------------------------------------------------------------------


def test_the_encoder_is_chosen_by_its_width(tmp_path):
    """``sdxl_models/*_vit-h`` needs the encoder in ``models``; the one in its own folder is wider."""
    base = student("sd1", tmp_path / "base")
    for name, width in (("models", 16), ("sdxl_models", 24)):
        (tmp_path / name).mkdir()
        ip_adapter(tmp_path / name, base.unet, width=width)
    file = tmp_path / "sdxl_models" / "ip-adapter_sdxl_vit-h.safetensors"
    shutil.copy(tmp_path / "models" / "ip-adapter.safetensors", file)
    under = with_control(base, file)
    assert under.image_encoder.config.projection_dim == 16
    pixels(under, **control_arguments(under, square(48)))
    fresh = student("sd1", tmp_path / "base")
    with raises_naming("projection_dim 16", 24):
        with_control(fresh, file, tmp_path / "sdxl_models" / "image_encoder")
    shutil.rmtree(tmp_path / "models" / "image_encoder")
    with raises_naming("projection_dim 16", "projection_dim 24", "sdxl_models"):
        with_control(student("sd1", tmp_path / "base"), file)
    (tmp_path / "elsewhere").mkdir()
    ip_adapter(tmp_path / "elsewhere", base.unet)
    under = with_control(student("sd1", tmp_path / "base"), file, tmp_path / "elsewhere" / "image_encoder")
    assert under.image_encoder.config.projection_dim == 16


def test_faceid_is_named(plain, tmp_path):
    file = ip_adapter(tmp_path, plain.unet)
    tensors = tensors_in(file)
    plus = {"image_proj.perceiver_resampler.proj_in.weight": torch.ones(4, 4)}
    face = {f"image_proj.{name}.weight": torch.ones(4, 4) for name in ("proj.0", "proj.2", "norm")}
    loras = {"ip_adapter.0.to_q_lora.down.weight": torch.ones(4, 4)}
    rest = {name: value for name, value in tensors.items() if name.startswith("ip_adapter.")}
    for more in (rest | plus, rest | face, tensors | loras):
        save_file(more, file)
        with raises_naming(file, "FaceID"):
            with_control(plain, file)


def test_image_encoders_that_are_broken(plain, tmp_path):
    file = ip_adapter(tmp_path, plain.unet)
    weights = tmp_path / "image_encoder" / "model.safetensors"
    whole, tensors = weights.read_bytes(), tensors_in(weights)
    weights.write_bytes(whole[:300])
    with raises_naming("image_encoder"):
        with_control(plain, file)
    kept = dict(sorted(tensors.items())[1:])
    lost = min(tensors)
    save_file(kept, weights, {"format": "pt"})
    with raises_naming(lost):
        with_control(plain, file)
    save_file(kept | {lost: torch.full_like(tensors[lost], float("inf"))}, weights, {"format": "pt"})
    with raises_naming(lost):
        with_control(plain, file)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with raises_naming("pytorch_model.bin"):
        with_control(plain, file)
    (tmp_path / "image_encoder" / "pytorch_model.bin").unlink()
    with raises_naming("image_encoder", ".safetensors"):
        with_control(plain, file)
    assert plain.image_encoder is None


def test_ip_adapters_that_are_broken(tmp_path):
    base = student("sd1", tmp_path)
    file = ip_adapter(tmp_path, base.unet)
    tensors = tensors_in(file)
    for name in ("image_proj.norm.weight", "image_proj.proj.weight", "ip_adapter.1.to_v_ip.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, file)
        with raises_naming("IP-Adapter"):
            with_control(student("sd1", tmp_path), file)
    save_file(tensors | {"image_proj.proj.bias": torch.full_like(tensors["image_proj.proj.bias"], float("nan"))}, file)
    with raises_naming("image_proj.proj.bias"):
        with_control(base, file)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (8000, 4500)])
def test_images_of_any_size_can_be_the_prompt(size, tmp_path):
    base = student("sd1", tmp_path)
    under = with_control(base, ip_adapter(tmp_path, base.unet))
    pixels(under, **control_arguments(under, Image.new("RGB", size, (200, 10, 10))))
    with raises_naming("1 x 30"):
        control_arguments(under, Image.new("RGB", (1, 30)))


def test_conditions_of_one_pixel_and_of_many(plain, saved):
    under = with_control(plain, saved)
    for size in ((1, 1), (12_000, 12_000)):
        args = control_arguments(under, Image.new("RGB", size, (255, 255, 255)))
        assert args["image"].size == (16, 16)
        pixels(under, **args)


def test_a_cast_logs_nothing(saved):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        assert load_control(saved, torch.bfloat16).dtype == torch.bfloat16
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
