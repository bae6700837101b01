"""What is particular to one family and no law of all."""

import io
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import wadi
from raising import raises_naming
from wadi.backbones import from_pipeline, load_pipeline, truncation_notice
from wadi.diffusion.schedulers import check_not_distilled, flow_shift, one_step_scheduler, resolution_shift
from wadi.extras.high_resolution.resize import set_resolution
from wadi.pipelines.generate import Sampling, generate_images
from wadi.prompts.cache import used_tokens
from wadi.sampling import many_steps, noise, one_step


@pytest.mark.parametrize(
    "absent", [(), ("text_encoder_3",), ("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")]
)
def test_sd3_without_some_of_its_text_encoders(folder_of, absent):
    pipeline = load_pipeline(folder_of("sd3"))
    whole = from_pipeline(pipeline).encode(["red apple", ""]).tensors
    for name in absent:
        pipeline.register_modules(**{name: None, name.replace("text_encoder", "tokenizer"): None})
    backbone = from_pipeline(pipeline)
    inputs = backbone.encode(["red apple", ""]).tensors
    assert {name: tensor.shape for name, tensor in inputs.items()} == {name: tensor.shape for name, tensor in whole.items()}
    places = {  # of each encoder: tokens and channels of the embeddings, channels of the pooled one
        "text_encoder": (slice(0, 16), slice(0, 16), slice(0, 16)),
        "text_encoder_2": (slice(0, 16), slice(16, 32), slice(16, 32)),
        "text_encoder_3": (slice(16, None), slice(None), None),
    }
    for name, (tokens, channels, pooled) in places.items():
        part, original = inputs["prompt_embeds"][:, tokens, channels], whole["prompt_embeds"][:, tokens, channels]
        torch.testing.assert_close(part, torch.zeros_like(original) if name in absent else original)
        if pooled:
            part, original = inputs["pooled"][:, pooled], whole["pooled"][:, pooled]
            torch.testing.assert_close(part, torch.zeros_like(original) if name in absent else original)


def test_sdxls_null_prompt_is_zeros_where_its_config_says_so(folder_of):
    pipeline = load_pipeline(folder_of("sdxl"))
    inputs = from_pipeline(pipeline).encode(["red apple", ""]).tensors
    assert inputs["prompt_embeds"][0].any()
    assert not inputs["prompt_embeds"][1].any()
    assert not inputs["pooled"][1].any()
    assert inputs["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert from_pipeline(pipeline).encode([""]).tensors["prompt_embeds"].any()


def test_pixart_is_told_its_size_and_masks_padding(folder_of):
    backbone = from_pipeline(load_pipeline(folder_of("pixart-alpha")), (32, 16))
    inputs = backbone.encode(["red apple", ""]).tensors
    assert inputs["size"].tolist() == [[32, 16]] * 2
    assert inputs["aspect_ratio"].tolist() == [[2]] * 2
    assert inputs["mask"].sum(1).tolist() == [len("▁red▁apple") + 1, 1]
    condition, x_t, t = backbone.encode(["red apple"]), torch.randn(1, *backbone.latent_shape), torch.tensor([300])
    before = backbone.predict(x_t, t, condition)
    condition.tensors["prompt_embeds"][0, 20:] += 1  # padding
    torch.testing.assert_close(backbone.predict(x_t, t, condition), before)
    assert backbone.network(x_t, condition.tensors["prompt_embeds"], t, condition_sizes(condition)).sample.shape[1] == 8
    assert before.shape[1] == 4


def condition_sizes(condition):
    return {"resolution": condition.tensors["size"], "aspect_ratio": condition.tensors["aspect_ratio"]}


def test_sanas_prompts_go_behind_its_instruction_and_the_null_prompt_does_not(folder_of):
    pipeline = load_pipeline(folder_of("sana"))
    backbone = from_pipeline(pipeline)
    bare, *_ = pipeline.encode_prompt([""], do_classifier_free_guidance=False, complex_human_instruction=None)
    null = backbone.encode([""]).tensors["prompt_embeds"]
    torch.testing.assert_close(null, bare)
    plain, *_ = pipeline.encode_prompt(["red apple"], do_classifier_free_guidance=False, complex_human_instruction=None)
    assert not torch.allclose(backbone.encode(["red apple"]).tensors["prompt_embeds"], plain, atol=1e-3)
    assert backbone.scale == 32


def test_lumina2s_prompts_go_behind_its_system_prompt_and_the_null_prompt_does_not(folder_of):
    pipeline = load_pipeline(folder_of("lumina2"))
    backbone = from_pipeline(pipeline)
    bare, mask, *_ = pipeline.encode_prompt(["red apple"], do_classifier_free_guidance=False, system_prompt="")
    inputs = backbone.encode(["red apple", ""]).tensors
    assert inputs["mask"][0].sum() > mask.sum() > inputs["mask"][1].sum()
    assert not torch.allclose(inputs["prompt_embeds"][:1], bare, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("lumina2", {"use_dynamic_shifting": True}),
        ("chroma", {"use_beta_sigmas": True}),
        ("chroma", {"use_karras_sigmas": True}),
        ("chroma", {"shift_terminal": 0.1, "use_dynamic_shifting": True, "base_shift": 0.2}),
    ],
)
def test_many_steps_are_spaced_as_the_models_own_scheduler_spaces_them(folder_of, name, spacing):
    pipeline = load_pipeline(folder_of(name))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **spacing)
    backbone = from_pipeline(pipeline, (32, 16))
    times = []
    hook = backbone.network.register_forward_pre_hook(lambda m, a, k: times.append(float(k["timestep"][0])), with_kwargs=True)
    condition, z = backbone.encode(["red apple"]), torch.randn(1, *backbone.latent_shape)
    many_steps(backbone, condition, condition, z, steps=4, guidance_scale=1.0)
    backbone.pipeline("red apple", num_inference_steps=4, output_type="latent", **backbone.call)
    hook.remove()
    assert len(set(times[:4])) == 4
    assert times[:4] == pytest.approx(times[4:], abs=1e-5)


def test_a_schedule_that_has_no_single_step_is_an_error(folder_of):
    pipeline = load_pipeline(folder_of("chroma"))
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift_terminal=0.1)
    backbone = from_pipeline(pipeline, (16, 16))
    condition, z = backbone.encode(["red apple"]), torch.randn(1, *backbone.latent_shape)
    with raises_naming("1 step"):
        many_steps(backbone, condition, condition, z, steps=1, guidance_scale=1.0)


def test_chromas_padding_counts_and_stays_in_a_cache(folder_of):
    """Its mask is added to the attention: tokens that it does not list weigh less, but are seen."""
    backbone = from_pipeline(load_pipeline(folder_of("chroma")), (16, 16))
    condition, x_t, t = backbone.encode(["red apple"]), torch.randn(1, *backbone.latent_shape), torch.tensor([300])
    assert condition.tensors["text_weights"].sum() == len("▁red▁apple") + 2  # the end and one token of padding
    assert used_tokens(condition.tensors).tolist() == [512]
    before = backbone.predict(x_t, t, condition)
    condition.tensors["prompt_embeds"][0, 20:] += 1
    assert not torch.allclose(backbone.predict(x_t, t, condition), before, atol=1e-3)


def test_qwen_images_padding_is_not_seen_and_its_text_is_cut_where_a_plain_call_cuts_it(folder_of):
    backbone = from_pipeline(load_pipeline(folder_of("qwen-image")), (16, 16))
    long, short = "red apple " * 100, "red apple"
    mask = backbone.encode([long, short]).tensors["mask"]
    assert mask.shape == (2, 512)
    assert mask[0].all()
    condition, x_t, t = backbone.encode([short]), torch.randn(1, *backbone.latent_shape), torch.tensor([300])
    before = backbone.predict(x_t, t, condition)
    condition.tensors["prompt_embeds"][0, int(mask[1].sum()) :] += 1
    torch.testing.assert_close(backbone.predict(x_t, t, condition), before)
    condition.tensors["prompt_embeds"][0, : int(mask[1].sum())] = torch.randn(int(mask[1].sum()), 32)
    assert (backbone.predict(x_t, t, condition) - before).abs().max() > 1e-4


def test_qwen_images_guidance_of_several_prompts_is_that_of_each(folder_of):
    """Also in a last batch that is smaller: its pipeline does not repeat a negative prompt."""
    pipeline = load_pipeline(folder_of("qwen-image"))
    set_resolution(pipeline, (16, 16))
    prompts, sampling = ["red apple", "blue car", "red car"], Sampling(steps=3, guidance_scale=3.0, batch=2)
    images = generate_images(pipeline, prompts, [1, 2, 3], sampling).images
    plain = generate_images(pipeline, prompts, [1, 2, 3], Sampling(steps=3, batch=2)).images
    for row, prompt in enumerate(prompts):
        alone = pipeline(
            prompt, negative_prompt="", true_cfg_scale=3.0, num_inference_steps=3, height=16, width=16,
            generator=torch.Generator().manual_seed(row + 1),
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(images[row], int) - np.asarray(alone, int)).max() <= 1
        assert images[row].tobytes() != plain[row].tobytes()


@pytest.mark.parametrize(("name", "guidance"), [("flux2", 4.0), ("flux2-klein", None)])
def test_flux2_tells_the_network_its_guidance_where_it_takes_one(folder_of, name, guidance):
    backbone = from_pipeline(load_pipeline(folder_of(name)), (32, 16))
    inputs = {}
    backbone.network.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    backbone.predict(torch.randn(2, *backbone.latent_shape), torch.tensor([250, 500]), backbone.encode(["red apple", ""]))
    assert backbone.latent_shape == (16, 8, 4)
    assert inputs["hidden_states"].shape == (2, 32, 16)
    assert (inputs["guidance"] is None) == (guidance is None)
    if guidance:
        assert inputs["guidance"].tolist() == [guidance] * 2
        assert backbone.call["guidance_scale"] == guidance
        assert backbone.guidance_arguments(1.0) == {"guidance_scale": guidance}


def test_a_distilled_klein_is_no_teacher(folder_of):
    pipeline = load_pipeline(folder_of("flux2-klein"))
    check_not_distilled(pipeline, pipeline.transformer)
    pipeline.register_to_config(is_distilled=True)
    with raises_naming("is_distilled"):
        check_not_distilled(pipeline, pipeline.transformer)


def test_flux_tells_the_network_its_guidance(folder_of):
    backbone = from_pipeline(load_pipeline(folder_of("flux")), (16, 16))
    inputs = {}
    backbone.network.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    backbone.predict(torch.randn(2, *backbone.latent_shape), torch.tensor([250, 500]), backbone.encode(["red apple", ""]))
    assert inputs["guidance"].tolist() == [3.5, 3.5]
    assert inputs["timestep"].tolist() == [0.25, 0.5]
    assert inputs["hidden_states"].shape == (2, 16, 16)
    assert backbone.call["guidance_scale"] == 3.5


def test_the_shift_by_resolution_is_that_of_the_papers_line():
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        assert resolution_shift(own.config, tokens) == pytest.approx(mu)
        assert flow_shift(own.config, tokens) == pytest.approx(math.exp(mu))


def test_the_last_of_twelve_steps_of_flux_is_not_wasted(folder_of):
    """At 1024 x 1024 pixels, by the formula of the shift: sigma = s / (s + (1 - s) / exp(1.15)), with s = 2/12, then 1/12."""
    backbone = from_pipeline(load_pipeline(folder_of("flux")))
    backbone.resolution, backbone.latent_shape = (1024, 1024), (4, 128, 128)
    scheduler = backbone.sampler()
    scheduler.set_timesteps(**backbone.sampler_arguments(12))
    assert [round(float(sigma), 3) for sigma in scheduler.sigmas[-3:]] == [0.387, 0.223, 0.0]


@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_setting_of_the_schedule_reaches_the_sampler(folder_of, dynamic, terminal):
    """Qwen-Image's schedule is stretched to 0.02; SD3's takes a shift by resolution if its config says so."""
    backbone = from_pipeline(load_pipeline(folder_of("sd3")))
    scheduler_class = type(backbone.pipeline.scheduler)
    backbone.pipeline.scheduler = scheduler_class(shift=3.0, use_dynamic_shifting=dynamic, shift_terminal=terminal)
    z, condition = noise(backbone.latent_shape, [3]), backbone.encode(["red apple"])
    ours = backbone.decode(many_steps(backbone, condition, condition, z, steps=4, guidance_scale=1.0))
    generator = torch.Generator().manual_seed(3)
    call = {**backbone.call, "num_inference_steps": 4, "output_type": "pt"}
    with torch.no_grad():
        theirs = backbone.pipeline("red apple", generator=generator, **call).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    last = float(backbone.pipeline.scheduler.sigmas[-2])
    assert last == pytest.approx(terminal) if terminal else last < 0.01


def test_a_student_cannot_generate_past_its_teachers_schedule(folder_of):
    scheduler = load_pipeline(folder_of("sd1")).scheduler
    with raises_naming("1000", "999"):
        one_step_scheduler(scheduler, 1000)


@pytest.mark.parametrize("timestep", [300, 999])
def test_a_students_schedule_is_the_teachers_up_to_its_timestep(folder_of, timestep):
    """One step needs its end alone. Image to image and more steps need what lies before."""
    scheduler = load_pipeline(folder_of("sd1")).scheduler
    own = one_step_scheduler(scheduler, timestep).alphas_cumprod
    torch.testing.assert_close(own, scheduler.alphas_cumprod[: timestep + 1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("words", ["vae.encode(", "vae.decode(", "latents_std"])
def test_the_package_has_one_encoder_and_decoder_of_images(words):
    root = Path(wadi.__file__).parent
    having = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if words in path.read_text()}
    assert having == {"diffusion/autoencoder.py"}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "pixart-alpha", "lumina2"])
def test_prompts_that_are_too_long_are_reported_once(folder_of, name, monkeypatch):
    backbone = from_pipeline(load_pipeline(folder_of(name)), (16, 16))
    handler = next(h for h in logging.getLogger("diffusers").handlers if type(h) is logging.StreamHandler)
    monkeypatch.setattr(truncation_notice._ONCE, "first", None)
    stream = io.StringIO()
    before = handler.setStream(stream)
    try:
        for i in range(3):
            backbone.encode([f"prompt {i} " + "of many words " * 200])
            backbone.pipeline([f"picture {i} " + "of many words " * 200], num_inference_steps=2, **backbone.call)
        logging.getLogger("diffusers.somewhere").warning("another remark")
    finally:
        handler.setStream(before)
    text = stream.getvalue()
    assert text.count("truncated") == 1
    assert len(text) < 800
    assert "another remark" in text


def test_z_images_call_computes_from_latents_in_float32(folder_of):
    """In half precision too: the image of a step is that of a plain call, with latents drawn by the call or given to it."""
    backbone = from_pipeline(load_pipeline(folder_of("z-image"), torch.bfloat16), (16, 16))
    last = backbone.process.last_timestep
    z = noise(backbone.latent_shape, [3])
    with torch.no_grad():
        ours = one_step(backbone, backbone.encode(["red apple"]), z, last)
        backbone.pipeline.scheduler = one_step_scheduler(backbone.pipeline.scheduler, last)
        call = {**backbone.call, "num_inference_steps": 1, "output_type": "latent"}
        drawn = backbone.pipeline("red apple", generator=torch.Generator().manual_seed(3), **call).images
        given = backbone.pipeline("red apple", latents=backbone.call_latents(z), **call).images
    torch.testing.assert_close(ours, drawn, rtol=0, atol=1e-6)
    torch.testing.assert_close(given, drawn, rtol=0, atol=0)
