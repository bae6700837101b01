"""One-step images under ControlNet, T2I-Adapter and IP-Adapter: diffusers' own pipelines, small random weights."""

import inspect
import shutil

import pytest
import torch
from PIL import Image

from backbones import small_pipelines
from raising import raises_naming
from wadi.backbones import from_pipeline
from wadi.diffusion.schedulers import one_step_scheduler, timestep_of
from wadi.extras.control.agreement import edge_f1, stacked
from wadi.extras.control.condition_images import to_image, to_tensor
from wadi.extras.control.edges import edge_map
from wadi.extras.control.losses import student_x0
from wadi.extras.control.network import controlled, controlnet_of
from wadi.extras.control.pipeline import control_arguments, with_control
from wadi.pipelines.generate import Sampling, generate_images
from wadi.pipelines.load import load
from wadi.sampling import noise

UNETS = ("sd1", "sd2", "sdxl")
TRANSFORMERS = ("sd3", "flux", "sana")


def student(name, folder, timestep=800, plain=True):
    """A small pipeline with a one-step student's scheduler; ``plain`` without what diffusers' controlled pipelines ignore."""
    pipeline = small_pipelines.make(name, folder)
    if plain:
        pipeline.vae.register_to_config(latents_mean=None, latents_std=None)
        if name == "sana":
            pipeline.transformer.register_to_config(timestep_scale=1.0)
    backbone = from_pipeline(pipeline, small_pipelines.RESOLUTIONS.get(name))
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, timestep)
    backbone.remember_resolution()
    return pipeline


def loud(model, seed=1):
    """Every zero-initialised tensor made random, so that the control does something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()


def control_for(name, pipeline):
    """An untrained control of the pipeline's own shape."""
    if name in UNETS:
        return loud(controlnet_of(pipeline.unet, pipeline.vae_scale_factor))
    import diffusers

    kind = {"sd3": "SD3ControlNetModel", "flux": "FluxControlNetModel", "sana": "SanaControlNetModel"}[name]
    takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
    kept = {k: v for k, v in pipeline.transformer.config.items() if k in takes} | {"num_layers": 1}
    return loud(getattr(diffusers, kind)(**kept))


def t2i_adapter():
    from diffusers import T2IAdapter

    torch.manual_seed(2)
    # Block 0 shrinks before it adds, block 1 does not shrink: 16 pixels, latents 8, features 4 and 4.
    return T2IAdapter(channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl").eval()


def pixels(pipeline, **more):
    call = from_pipeline(pipeline).call
    generator = [torch.Generator().manual_seed(7)]
    out = pipeline(prompt=["red apple"], generator=generator, num_inference_steps=1, output_type="np", **{**call, **more})
    return torch.from_numpy(out.images)


def square(side):
    image = Image.new("RGB", (side, side))
    image.paste((255, 255, 255), (side // 4, side // 4, side // 2, side // 2))
    return image


def condition_of(pipeline):
    return square(from_pipeline(pipeline).resolution[0])


# --- ControlNets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_one_step_under_a_controlnet(name, tmp_path):
    plain = student(name, tmp_path)
    before = pixels(plain)
    network, scheduler, calls = from_pipeline(plain).network, plain.scheduler, []
    under = with_control(plain, control_for(name, plain))
    assert type(under).__name__ != type(plain).__name__
    assert "ControlNet" in type(under).__name__
    assert under.scheduler is scheduler
    network.register_forward_hook(lambda *_: calls.append(1))
    image = condition_of(plain)
    off = pixels(under, **control_arguments(under, image, 0.0))
    assert len(calls) == 1, "one step is one evaluation"
    if name == "flux":  # its pipeline encodes the condition with the image's generator, before the noise is drawn
        other = Image.new("RGB", image.size, (200, 30, 90))
        before = pixels(under, **control_arguments(under, other, 0.0))
    torch.testing.assert_close(off, before, atol=1e-5, rtol=0)
    half, full = (pixels(under, **control_arguments(under, image, s)) for s in (0.5, 1.0))
    assert (full - off).abs().mean() > 1e-4
    assert not torch.equal(half, full)
    assert not torch.equal(half, off)


@pytest.mark.parametrize("name", UNETS)
def test_the_student_generates_at_its_timestep(name, tmp_path):
    plain = student(name, tmp_path, timestep=613)
    under = with_control(plain, control_for(name, plain))
    timesteps = []
    under.unet.register_forward_pre_hook(
        lambda _, args, kwargs: timesteps.append(float(torch.as_tensor(args[1]))), with_kwargs=True
    )
    pixels(under, **control_arguments(under, condition_of(plain)))
    assert timesteps == [613.0]
    assert timestep_of(under.scheduler) == 613


@pytest.mark.parametrize("name", UNETS)
def test_an_untrained_controlnet_changes_nothing(name, tmp_path):
    plain = student(name, tmp_path)
    before = pixels(plain)
    under = with_control(plain, controlnet_of(plain.unet, plain.vae_scale_factor))
    torch.testing.assert_close(pixels(under, **control_arguments(under, condition_of(plain), 2.0)), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("slim", [False, True])
def test_controlled_does_what_the_pipeline_does(slim, tmp_path):
    plain = student("sd1", tmp_path)
    net = loud(controlnet_of(plain.unet, plain.vae_scale_factor, slim))
    backbone, image = from_pipeline(plain), condition_of(plain)
    z = noise(backbone.latent_shape, [7])
    tensor = to_tensor(image)
    with torch.no_grad():
        x0 = student_x0(backbone, net, z, tensor, backbone.encode(["red apple"]), 800)
        free = student_x0(
            backbone, controlnet_of(plain.unet, plain.vae_scale_factor), z, tensor, backbone.encode(["red apple"]), 800
        )
    under = with_control(plain, net)
    expected = pixels(under, **control_arguments(under, image)).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone.decode(x0), expected, atol=1e-5, rtol=0)
    assert (x0 - free).abs().mean() > 1e-3
    t = torch.tensor([800])
    with torch.no_grad(), controlled(plain.unet, net, tensor, strength=0.6):
        weaker = backbone.process.x0(backbone.predict(z, t, backbone.encode(["red apple"])), z, t)
    expected = pixels(under, **control_arguments(under, image, 0.6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone.decode(weaker), expected, atol=1e-5, rtol=0)
    assert not plain.unet._forward_pre_hooks


def test_controlled_repeats_conditions_for_guidance(tmp_path):
    plain = student("sd1", tmp_path)
    net, backbone = loud(controlnet_of(plain.unet, plain.vae_scale_factor)), from_pipeline(plain)
    z, t = noise(backbone.latent_shape, [1, 2]), torch.full((2,), 800)
    condition, image = backbone.encode(["red apple", "blue car"]), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), controlled(plain.unet, net, image, 0.7):
        once = backbone.predict(z, t, condition)
        twice = backbone.predict(z.repeat(2, 1, 1, 1), t.repeat(2), type(condition).cat([condition, condition]))
    torch.testing.assert_close(twice, once.repeat(2, 1, 1, 1), atol=1e-5, rtol=0)


def test_a_controlnet_copies_its_unet_also_where_its_time_embedding_is_wider(tmp_path):
    from diffusers import UNet2DConditionModel

    unet = small_pipelines.make("sd1", tmp_path).unet
    narrow = UNet2DConditionModel(**{**unet.config, "time_embedding_dim": 24})
    controlnet = controlnet_of(narrow, 2)
    x, t, words = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 5, 32)
    outputs = {}
    for key, model in (("unet", narrow), ("control", controlnet)):
        model.mid_block.register_forward_hook(lambda _, __, out, key=key: outputs.update({key: out}))
    with torch.no_grad():
        narrow(x, t, encoder_hidden_states=words)
        controlnet(x, t, encoder_hidden_states=words, controlnet_cond=torch.rand(1, 3, 16, 16))
    torch.testing.assert_close(outputs["control"], outputs["unet"], atol=1e-5, rtol=1e-4)


def test_half_precision_and_batches_give_the_same_images(tmp_path):
    plain = student("sd1", tmp_path)
    net = control_for("sd1", plain)
    under = with_control(plain, net)
    args = control_arguments(under, condition_of(plain), 0.8)
    alone = generate_controlled(under, ["red apple"], [7], args)
    among = generate_controlled(under, ["blue car", "red apple"], [3, 7], args)
    assert alone[0].tobytes() == among[1].tobytes()
    low = with_control(plain.to(torch.bfloat16), net)
    assert low.unet.dtype == low.controlnet.dtype == low.vae.dtype == torch.bfloat16
    generate_controlled(low, ["red apple"], [7], control_arguments(low, condition_of(low), 0.8))


def generate_controlled(pipeline, prompts, seeds, args):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = from_pipeline(pipeline).call
    return pipeline(prompt=prompts, generator=generators, num_inference_steps=1, **{**call, **args}).images


def test_the_plain_pipeline_still_works_after_control_was_added_to_a_copy(tmp_path):
    plain = student("sd1", tmp_path)
    before = generate_images(plain, ["red apple"], [1]).images[0].tobytes()
    with_control(plain, control_for("sd1", plain))
    assert generate_images(plain, ["red apple"], [1]).images[0].tobytes() == before


def test_the_embedded_controlnet_puts_edges_where_they_belong():
    prompts = ["ghost, on a green background", "red apple", "bomb, noto style", "frog, on a black background"] * 2
    pipeline = load()
    sources = stacked(generate_images(pipeline, prompts, range(100, 108)).images)
    edges = edge_map(sources)
    under = with_control(pipeline, "zoo")
    conditions = [to_image(mask) for mask in edges]
    free, steered = (
        generate_images(under, prompts, range(8), Sampling(call=control_arguments(under, conditions, strength))).images
        for strength in (0.0, 1.0)
    )
    f1 = [edge_f1(edge_map(stacked(images)), edges) for images in (free, steered)]
    assert f1[1] > f1[0] + 0.15


# --- T2I-Adapter, IP-Adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_one_step_under_a_t2i_adapter(name, tmp_path):
    plain = student(name, tmp_path)
    before, calls = pixels(plain), []
    under = with_control(plain, t2i_adapter())
    assert "Adapter" in type(under).__name__
    assert under.scheduler is plain.scheduler
    under.unet.register_forward_hook(lambda *_: calls.append(1))
    off, full = (pixels(under, **control_arguments(under, condition_of(plain), s)) for s in (0.0, 1.0))
    assert len(calls) == 2
    torch.testing.assert_close(off, before, atol=1e-5, rtol=0)
    assert (full - off).abs().mean() > 1e-4


def ip_adapter(folder, unet, tokens=4, width=16):
    """An IP-Adapter's file with its image encoder next to it, for ``unet``."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    cross = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(tokens * cross, width), "image_proj.proj.bias": torch.randn(tokens * cross),
        "image_proj.norm.weight": torch.ones(cross), "image_proj.norm.bias": torch.zeros(cross),
    }  # fmt: skip
    layers = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    for i, layer in enumerate(layers):
        shape = unet.get_submodule(layer.removesuffix(".processor")).to_k.weight.shape
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * i + 1}.{part}.weight"] = torch.randn(shape)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, image_size=32,
                              patch_size=16, projection_dim=width)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    save_file(tensors, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_one_step_under_an_ip_adapter(name, tmp_path):
    plain = student(name, tmp_path)
    before, calls, scheduler = pixels(plain), [], plain.scheduler
    under = with_control(plain, ip_adapter(tmp_path, plain.unet))
    assert under.scheduler is scheduler
    under.unet.register_forward_hook(lambda *_: calls.append(1))
    image = square(48)
    off, full = (pixels(under, **control_arguments(under, image, s)) for s in (0.0, 1.0))
    assert len(calls) == 2
    torch.testing.assert_close(off, before, atol=1e-5, rtol=0)
    assert (full - off).abs().mean() > 1e-5


def test_an_image_prompt_and_a_controlnet_together(tmp_path):
    plain = student("sd1", tmp_path)
    file = ip_adapter(tmp_path, plain.unet)
    under = with_control(with_control(plain, control_for("sd1", plain)), file)
    args = control_arguments(under, condition_of(plain), 0.7)
    outs = [pixels(under, **args, **control_arguments(under, square(48), s, image_prompt=True)) for s in (0.0, 1.0)]
    assert not torch.equal(*outs)


@pytest.mark.parametrize(("name", "setting"), [("sdxl", "latents_mean"), ("sana", "timestep_scale")])
def test_settings_that_controlled_pipelines_ignore_are_rejected(name, setting, tmp_path):
    """The plain pipeline obeys them, so that even a control of strength 0 would change the images."""
    base = student(name, tmp_path, plain=False)
    with raises_naming(setting):
        with_control(base, t2i_adapter() if name == "sdxl" else control_for(name, base))


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_a_controlnet_of_another_family_is_rejected_by_its_numbers(tmp_path):
    small = student("sd1", tmp_path)
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel(**{**small.unet.config, "cross_attention_dim": 48, "block_out_channels": (8, 32)})
    with raises_naming("block_out_channels [8, 32]", [16, 32], "cross_attention_dim 48", 32):
        with_control(small, controlnet_of(other, 2))
    with raises_naming("8 times", "2 times"):
        with_control(small, controlnet_of(small.unet, 8))
    with raises_naming(type(small).__name__, "FluxControlNetModel"):
        with_control(small, control_for("flux", student("flux", tmp_path / "flux")))


def test_adapters_of_another_family_are_rejected(tmp_path):
    from diffusers import T2IAdapter

    plain = student("sd1", tmp_path)
    with raises_naming("T2I-Adapter", [(16, 4), (32, 4)]):
        with_control(plain, T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"))
    other = student("sdxl", tmp_path / "xl")
    file = ip_adapter(tmp_path, other.unet)
    with raises_naming("IP-Adapter"):
        with_control(plain, file)
    with raises_naming("SanaPipeline"):
        with_control(student("sana", tmp_path / "sana"), file)


def test_controls_that_do_not_exist(tmp_path):
    plain = student("sd1", tmp_path)
    for missing in (tmp_path / "none", "./nothing-here"):
        with raises_naming(missing):
            with_control(plain, missing)
    (tmp_path / "empty").mkdir()
    with raises_naming("empty"):
        with_control(plain, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with raises_naming("AutoencoderKL"):
        with_control(plain, tmp_path / "empty")
    with raises_naming("ip-adapter.safetensors"):
        with_control(plain, tmp_path / "ip-adapter.safetensors")
    file = ip_adapter(tmp_path, plain.unet)
    (tmp_path / "image_encoder" / "config.json").rename(tmp_path / "config.json")
    shutil.rmtree(tmp_path / "image_encoder")
    with raises_naming("image_encoder"):
        with_control(plain, file)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with raises_naming("broken.safetensors"):
        with_control(plain, tmp_path / "broken.safetensors")


def test_a_saved_controlnet_is_found_by_its_folder(tmp_path):
    plain = student("sd1", tmp_path)
    net = control_for("sd1", plain)
    net.save_pretrained(tmp_path / "net")
    args = control_arguments(with_control(plain, net), condition_of(plain))
    saved, loaded = (pixels(with_control(plain, one), **args) for one in (net, tmp_path / "net"))
    torch.testing.assert_close(loaded, saved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [-0.1, 2.01, float("nan")])
def test_strength_out_of_range(strength, tmp_path):
    plain = student("sd1", tmp_path)
    under = with_control(plain, control_for("sd1", plain))
    with raises_naming(strength):
        control_arguments(under, condition_of(plain), strength)


def test_conditions_are_resized_or_rejected(tmp_path):
    plain = student("sd1", tmp_path)
    under = with_control(plain, control_for("sd1", plain))
    assert control_arguments(under, square(64))["image"].size == (16, 16)
    with raises_naming("32 x 16", "16 x 16"):
        control_arguments(under, Image.new("RGB", (32, 16)))
    with raises_naming("missing.png"):
        control_arguments(under, tmp_path / "missing.png")
    with raises_naming(type(plain).__name__):
        control_arguments(plain, square(16))
    with raises_naming("0 images"):
        control_arguments(under, [])
    with raises_naming("2 images"):
        control_arguments(under, [square(16)] * 2, image_prompt=True)
    lists = control_arguments(under, [square(16), square(32)])
    assert [one.size for one in lists["image"]] == [(16, 16)] * 2
