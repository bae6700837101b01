"""What a model family has to pass: one class, parametrised over families by the fixture ``family`` (see `Family`).

A family of your own is checked by subclassing it with a ``family`` fixture (docs/add-a-family.md). This is the only module of
the package that imports pytest.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from wadi import roles
from wadi.backbones import Condition, from_pipeline
from wadi.backbones.condition import sizes_and_dtype
from wadi.diffusion.process import Prediction
from wadi.diffusion.schedulers import one_step_scheduler, student_scheduler
from wadi.distill.batch import Batch
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.networks import RoleNetworks
from wadi.distill.objectives import make_objective
from wadi.distill.optimizers import initial_state
from wadi.distill.plan.architecture import Architecture
from wadi.distill.plan.plan import plan_run
from wadi.distill.setup import attach_roles
from wadi.distill.step import train_step
from wadi.errors import WadiError
from wadi.sampling import few_steps, many_steps, noise, noises, one_step, predict_guided

PROMPTS = ["red apple", "blue car"]
SEEDS = [3, 4]
LONG = " ".join(f"{['red', 'blue', 'green'][i % 3]} {['apple', 'car', 'land'][i * i % 7 % 3]}" for i in range(350))
ROLES = ("student", "fake")
EARLY = 700  # a student's timestep before the last


@dataclass
class Family:
    """A small pipeline of a family and what is known of it apart from its backbone.

    Attributes:
        pipeline: loaded, in float32; tests work on copies of it.
        resolution: to test at; None = the model's own.
        adapted: whether the student's adapter belongs on a layer, by name and module; ``fake`` likewise.
        last: its last timestep, at which ``sigma`` is 1 in a flow.
        features: whether the network has a middle block that `wadi.backbones.features` knows; a GAN is refused without one.
        idle: names of layers whose output the network throws away, so that no gradient reaches their angles.
        traceable: whether `wadi plan` can count the activations; not if what the network computes depends on numbers.
        second_pass: whether a call of the pipeline can compute guidance by a second pass.
        mu: logarithm of the flow's shift by tokens and steps, if the pipeline has a rule of its own.
    """

    pipeline: Any
    adapted: Callable[[str, nn.Module], bool]
    fake: Callable[[str, nn.Module], bool]
    resolution: tuple[int, int] | None = None
    last: int = 999
    features: bool = True
    idle: tuple[str, ...] = ()
    traceable: bool = True
    second_pass: bool = True
    mu: Callable[[int, int], float] | None = None

    def backbone(self, dtype: torch.dtype = torch.float32):
        """Return the backbone of a copy of the pipeline, for images twice as wide as high, so that swapped sides show."""
        own = from_pipeline(self.pipeline, self.resolution)
        height, width = own.resolution
        pipeline = copy.copy(self.pipeline)
        network = copy.deepcopy(own.network).to(dtype)
        pipeline.register_modules(**{own.component: network})
        return from_pipeline(pipeline, (height, 2 * width))


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def naming(what):
    """Return ``msg`` for `assert_close` that says what differs."""
    return lambda message: f"{what}: {message}"


def assert_same_layers(found, expected, what):
    """Require the same names, and say which are missing or should not be there."""
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    assert (missing, surplus) == ([], []), f"{what}: missing {missing}; not expected {surplus}"


def images_of(backbone, **call):
    with torch.no_grad():
        return backbone.pipeline(prompt=list(PROMPTS), generator=generators(), output_type="pt", **backbone.call | call).images


def network_inputs(backbone, dtype=torch.float32):
    """``x_t``, ``t``, condition: two rows, the second one the null prompt, at two timesteps."""
    condition = backbone.encode([PROMPTS[0], ""])
    return noise(backbone.latent_shape, SEEDS).to(dtype), torch.tensor([EARLY, 40]), condition


@contextmanager
def fed(backbone):
    """Record every tensor that the network is called with, by the name of its argument. The last call counts."""
    inputs = {}
    names = inspect.signature(backbone.network.forward)

    def note(module, args, kwargs):
        for name, value in names.bind(*args, **kwargs).arguments.items():
            parts: Any = value.items() if isinstance(value, dict) else [("", value)]
            parts = enumerate(value) if isinstance(value, (list, tuple)) else parts
            for key, part in parts:
                if isinstance(part, torch.Tensor):
                    inputs[f"{name} {key}".strip()] = part.detach().clone()

    handle = backbone.network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def passes(backbone):
    """Record the number of rows of every pass through the network."""
    batches = []

    def note(module, args, kwargs):
        values = (*args, *kwargs.values())
        batches.append(len(next(v for v in values if isinstance(v, list) or (isinstance(v, torch.Tensor) and v.ndim > 1))))

    handle = backbone.network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


def takes_eulers_steps(scheduler):
    """Whether a pipeline's own scheduler is deterministic and of first order. Others are replaced by the family's sampler."""
    return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling


def formula_times(backbone, steps, mu=None):
    """``(now, then)`` of each step, with ``t`` and ``alpha2`` of DDIM at trailing times or ``sigma`` of the shifted flow.

    Written from the papers and diffusers' documentation, from configs alone.
    """
    scheduler = backbone.pipeline.scheduler
    config, T = scheduler.config, scheduler.config.num_train_timesteps
    if backbone.process.prediction != "velocity":
        betas = {
            "linear": lambda: torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64),
            "scaled_linear": lambda: torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64) ** 2,
        }[config.beta_schedule]()
        alpha2 = (1 - betas).cumprod(0)
        times = [{"t": t, "alpha2": float(alpha2[t])} for t in (round(T - T * i / steps) - 1 for i in range(steps))]
        return list(zip(times, [*times[1:], {"alpha2": 1.0}], strict=True))
    height, width = backbone.latent_shape[1] // backbone.patch, backbone.latent_shape[2] // backbone.patch
    shift = config.get("flow_shift") or config.get("shift") or 1.0
    if config.get("use_dynamic_shifting"):  # exp(mu), with mu on a line through two numbers of tokens
        (few, many), (low, high) = ((config[a], config[b]) for a, b in (
            ("base_image_seq_len", "max_image_seq_len"), ("base_shift", "max_shift")))  # fmt: skip
        shift = math.exp(mu(height * width, steps) if mu else low + (height * width - few) * (high - low) / (many - few))

    def shifted(sigma):
        return shift * sigma / (1 + (shift - 1) * sigma)

    # Euler spaces its steps from 1 to the last of T, which a fixed shift has moved already, and shifts them.
    low = 1 / T if config.get("use_dynamic_shifting") else shifted(1 / T)
    even = [1 - i / steps for i in range(steps)] if backbone.sampler_sigmas(steps) else None
    sigmas = [shifted(s) for s in even or [1 + (low - 1) * i / (steps - 1) for i in range(steps)]]
    if config.get("shift_terminal"):  # stretched so that the last is this one
        sigmas = [1 - (1 - s) * (1 - config.shift_terminal) / (1 - sigmas[-1]) for s in sigmas]
    times = [{"t": T * sigma, "sigma": sigma} for sigma in sigmas]
    return list(zip(times, [*times[1:], {"sigma": 0.0}], strict=True))


def autoencoder_traffic(vae, monkeypatch):
    """Notes what goes into and comes out of ``vae``: lists of ``images``, ``latents`` (encoded), ``decoded`` (latents)."""
    traffic: dict[str, list[torch.Tensor]] = {"images": [], "latents": [], "decoded": []}
    encode, decode = vae.encode, vae.decode

    def encoding(x, **kwargs):
        encoded = encode(x, **kwargs)
        first = encoded[0]
        traffic["images"].append(x)
        traffic["latents"].append(first if isinstance(first, torch.Tensor) else first.mode())
        return encoded

    def decoding(z, **kwargs):
        traffic["decoded"].append(z)
        return decode(z, **kwargs)

    monkeypatch.setattr(vae, "encode", encoding)
    monkeypatch.setattr(vae, "decode", decoding)
    return traffic


def config(**changes):
    return DistillConfig(
        batch=2, student=StudentConfig(rank=3, lr=1e-2), fake=FakeConfig(rank=2, lr=1e-2, null_probability=0.0), **changes
    )


def with_roles(backbone, **changes):
    """Student and fake attached, their angles random: at zero both are the teacher."""
    settings = config(**changes)
    torch.manual_seed(1)
    attach_roles(backbone, settings)
    with torch.no_grad():
        for role in ("student", "fake"):
            for parameter in roles.parameters(backbone.network, role).values():
                parameter.normal_(std=0.1)
    return settings


def all_tensors(network):
    """Return every tensor of a network, those of an adapter with its role before their names."""
    return roles.base_tensors(network) | {
        f"{role} {name}": tensor for role in ROLES for name, tensor in roles.parameters(network, role).items()
    }


def student_gradients(backbone):
    """Gradients of all angles of the student, by name, of one student step towards zero."""
    z, _, condition = network_inputs(backbone)
    angles = roles.parameters(backbone.network, "student")
    with roles.active(backbone.network, "student"):
        one_step(backbone, condition, z, EARLY).square().mean().backward()
    return {name: parameter.grad for name, parameter in angles.items()}


class Conformance:
    """The contract of `wadi.backbones.base.Backbone`, as laws."""

    def test_the_schedule_and_the_shapes_are_the_pipelines(self, family):
        backbone = family.backbone()
        scheduler, process = family.pipeline.scheduler, backbone.process
        assert process.num_timesteps == scheduler.config.num_train_timesteps
        assert process.last_timestep == family.last
        with pytest.raises(WadiError, match=str(family.last + 1)):
            one_step_scheduler(backbone.pipeline.scheduler, family.last + 1)
        if process.alphas is not None:
            torch.testing.assert_close(process.alphas.double() ** 2, scheduler.alphas_cumprod.double(), rtol=1e-6, atol=0)
        x_t, t, condition = network_inputs(backbone)
        assert backbone.autoencoder_scale(family.pipeline.vae.config) == family.pipeline.vae_scale_factor
        prediction = backbone.predict(x_t, t, condition)
        assert prediction.shape == x_t.shape == (2, *backbone.latent_shape)
        assert prediction.dtype == torch.float32
        assert prediction.std() > 0.01

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "velocity"])
    def test_predictions_convert_both_ways(self, family, kind: Prediction):
        backbone = family.backbone()
        process = backbone.process
        x_t, t, condition = network_inputs(backbone)
        own = backbone.predict(x_t, t, condition).double()
        x0, eps = process.split(own, x_t.double(), t)
        torch.testing.assert_close(process.add_noise(x0, eps, t), x_t.double())
        other = process.join(x0, eps, t, kind)
        back_x0, back_eps = process.split(other, x_t.double(), t, kind)
        torch.testing.assert_close(process.join(back_x0, back_eps, t), own, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("early", [False, True])
    def test_one_step_is_the_pipelines_own(self, family, early):
        backbone = family.backbone()
        timestep = EARLY if early else backbone.process.last_timestep
        z, condition = noise(backbone.latent_shape, SEEDS), backbone.encode(PROMPTS)
        attach_roles(backbone, config())
        with torch.no_grad(), roles.active(backbone.network, "student"):
            ours = backbone.decode(one_step(backbone, condition, z, timestep))
        plain = family.backbone()
        plain.pipeline.scheduler = one_step_scheduler(plain.pipeline.scheduler, timestep)
        torch.testing.assert_close(ours, images_of(plain, num_inference_steps=1), rtol=0, atol=2e-5)

    def test_a_saved_scheduler_still_makes_the_step(self, family, tmp_path):
        backbone = family.backbone()
        for timestep in (EARLY, backbone.process.last_timestep):
            scheduler = one_step_scheduler(backbone.pipeline.scheduler, timestep)
            scheduler.save_pretrained(tmp_path / str(timestep))
            read = type(scheduler).from_pretrained(tmp_path / str(timestep))
            read.set_timesteps(1)
            assert [round(float(t), 3) for t in read.timesteps] == [timestep]
            x_t, t, condition = network_inputs(backbone)
            prediction = backbone.predict(x_t, t, condition)
            expected = backbone.process.x0(prediction, x_t, torch.full((2,), timestep))
            stepped = read.step(prediction, read.timesteps[0], x_t).prev_sample
            torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("timesteps", [(EARLY, EARLY - 350), "from the last", "uneven"])
    def test_a_few_steps_are_the_pipelines_own(self, family, timesteps, tmp_path):
        """With the scheduler read back from a file: predict, add the noise of the image's own seed, predict."""
        backbone = family.backbone()
        last, flow = backbone.process.last_timestep, backbone.process.alphas is None
        if timesteps == "from the last":
            timesteps = tuple(last - round(i * (last + (not flow)) / 4) for i in range(4))
        elif timesteps == "uneven":  # a constant ratio for flows; LCM rounds down when four steps do not divide fifty
            timesteps = (900, 600, 400) if flow else (999, 759, 499, 259)
        scheduler = student_scheduler(backbone.pipeline.scheduler, timesteps)
        scheduler.save_pretrained(tmp_path)
        z, *later = noises(backbone, SEEDS, len(timesteps))
        with torch.no_grad():
            ours = backbone.decode(few_steps(backbone, backbone.encode(PROMPTS), z, timesteps, later))
        read, own = type(scheduler).from_pretrained(tmp_path), generators()
        read.step = functools.partial(read.step, generator=own)  # some pipelines do not pass the generators on
        backbone.pipeline.scheduler = read
        with torch.no_grad():
            call = {**backbone.call, "num_inference_steps": len(timesteps), "output_type": "pt"}
            theirs = backbone.pipeline(prompt=list(PROMPTS), generator=own, **call).images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)

    @pytest.mark.parametrize("steps", [3, 12])
    def test_many_steps_with_guidance_are_the_pipelines_own(self, family, steps):
        """The call chooses sigmas and their shift by itself, with the scheduler that came with it if that is Euler's."""
        backbone = family.backbone()
        z, condition, null = noise(backbone.latent_shape, SEEDS), backbone.encode(PROMPTS), backbone.encode([""])
        scale = 2.0 if family.second_pass else 1.0
        if not family.second_pass:
            with pytest.raises(WadiError, match=r"2\.0"):
                backbone.guided_call(2.0, len(PROMPTS))
        ours = backbone.decode(many_steps(backbone, condition, null, z, steps, guidance_scale=scale))
        arguments, scheduler = backbone.sampler_arguments(steps), backbone.sampler()
        if not takes_eulers_steps(backbone.pipeline.scheduler):
            backbone.pipeline.scheduler = scheduler
        theirs = images_of(backbone, num_inference_steps=steps, **backbone.guided_call(scale, len(PROMPTS)))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        scheduler.set_timesteps(**arguments)
        torch.testing.assert_close(scheduler.timesteps, backbone.pipeline.scheduler.timesteps, rtol=1e-5, atol=1e-3)
        with passes(backbone) as batches:
            images_of(backbone, num_inference_steps=steps, **backbone.guided_call(1.0, len(PROMPTS)))
        assert batches == [len(PROMPTS)] * steps  # a scale of 1 is no guidance: one conditional pass

    def test_many_steps_follow_an_independent_formula(self, family):
        """DDIM over the schedule's own alphas, or Euler along the flow, with the prediction of two passes mixed."""
        backbone = family.backbone()
        z, condition, null = noise(backbone.latent_shape, SEEDS), backbone.encode(PROMPTS), backbone.encode([""])
        ours = many_steps(backbone, condition, null, z, steps=4, guidance_scale=2.0)
        x = z
        for now, then in formula_times(backbone, 4, family.mu):
            t = torch.full((2,), now["t"])
            with torch.no_grad():
                prediction = backbone.guided(backbone.predict(x, t, condition), backbone.predict(x, t, null.expand(2)), 2.0)
            if "sigma" in now:
                x = x + (then["sigma"] - now["sigma"]) * prediction
                continue
            a, s, b = now["alpha2"] ** 0.5, (1 - now["alpha2"]) ** 0.5, then["alpha2"]
            x0 = (x - s * prediction) / a if backbone.process.prediction == "epsilon" else a * x - s * prediction
            x = b**0.5 * x0 + (1 - b) ** 0.5 * (x - a * x0) / s
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))

    def test_a_deterministic_first_order_pipeline_takes_the_same_steps_by_itself(self, family):
        """With the scheduler that came with the pipeline."""
        backbone = family.backbone()
        if not takes_eulers_steps(backbone.pipeline.scheduler):
            pytest.skip(f"{type(backbone.pipeline.scheduler).__name__} takes other steps")
        z, condition, null = noise(backbone.latent_shape, SEEDS), backbone.encode(PROMPTS), backbone.encode([""])
        ours = backbone.decode(many_steps(backbone, condition, null, z, steps=3, guidance_scale=1.0))
        torch.testing.assert_close(ours, images_of(backbone, num_inference_steps=3), rtol=0, atol=5e-5)

    def test_training_feeds_the_network_what_a_plain_call_does(self, family):
        """Every tensor of one step: embeddings of prompts beyond any limit, masks, sizes, time, guidance, the latents."""
        backbone = family.backbone()
        last = backbone.process.last_timestep
        prompts = [LONG, PROMPTS[0]]
        with fed(backbone) as ours:
            backbone.predict(noise(backbone.latent_shape, SEEDS), torch.full((2,), last), backbone.encode(prompts))
        backbone.pipeline.scheduler = one_step_scheduler(backbone.pipeline.scheduler, last)
        with fed(backbone) as plain, torch.no_grad():
            backbone.pipeline(prompt=list(prompts), generator=generators(), num_inference_steps=1, **backbone.call)
        assert ours.keys() == plain.keys()
        for name, tensor in plain.items():
            expected = tensor.float().expand_as(ours[name])
            torch.testing.assert_close(ours[name].float(), expected, rtol=1e-4, atol=1e-5, msg=naming(name))

    def test_a_prompt_beyond_the_limit_is_cut_where_the_call_cuts_it(self, family):
        """What follows the limit changes nothing; `condition_shapes` states the same number of tokens."""
        backbone = family.backbone()
        cut, longer = backbone.encode([LONG]).tensors, backbone.encode([f"{LONG} {PROMPTS[1]}"]).tensors
        shapes = {name: sizes_and_dtype(shape) for name, shape in backbone.condition_shapes().items()}
        assert shapes.keys() == cut.keys()
        for name, tensor in cut.items():
            torch.testing.assert_close(longer[name], tensor, rtol=1e-4, atol=1e-5, msg=naming(name))
            sizes, dtype = shapes[name]
            assert len(sizes) == tensor.ndim - 1, name
            assert (dtype == tensor.dtype) or (dtype.is_floating_point and tensor.is_floating_point()), (
                f"condition_shapes() gives {dtype} for {name}, which is {tensor.dtype}"
            )

    def test_a_call_starts_from_latents_that_are_given_to_it(self, family):
        backbone = family.backbone()
        z = noise(backbone.latent_shape, SEEDS)
        backbone.pipeline.scheduler = one_step_scheduler(backbone.pipeline.scheduler, backbone.process.last_timestep)
        drawn = images_of(backbone, num_inference_steps=1)
        given = images_of(backbone, num_inference_steps=1, latents=backbone.call_latents(z))
        torch.testing.assert_close(given, drawn, rtol=0, atol=2e-5)

    def test_a_size_off_by_one_patch_is_refused(self, family):
        """And the network predicts at the next size that is not."""
        backbone = family.backbone()
        height, width = backbone.resolution
        multiple = backbone.scale * backbone.patch
        for off in (backbone.scale if backbone.patch > 1 else backbone.scale // 2, multiple - 1):
            for size in ((height + off, width), (height, width - off)):
                with pytest.raises(WadiError, match=rf"{size[0]} x {size[1]}.*\b{multiple}\b"):
                    backbone.check_resolution(size)
        with pytest.raises(WadiError):
            backbone.check_resolution((0, width))
        larger = from_pipeline(backbone.pipeline, (height + multiple, width))
        x_t, t, condition = network_inputs(larger)
        assert larger.predict(x_t, t, condition).shape == x_t.shape
        assert larger.decode(x_t[:1]).shape == (1, 3, height + multiple, width)

    def test_it_is_planned_from_configs_alone(self, family):
        """With the layers and the number of parameters of a real run, and the memory of a step."""
        backbone, settings = family.backbone(), config(resolution=family.backbone().resolution)
        pipeline = backbone.pipeline
        configs = {part: {"_class_name": type(part).__name__, **part.config} for part in (backbone.network, pipeline.scheduler)}
        architecture = Architecture(
            model="small", pipeline=type(pipeline).__name__, vae_scale_factor=backbone.autoencoder_scale(pipeline.vae.config),
            network=configs[backbone.network], scheduler=configs[pipeline.scheduler], other_parameters={},
        )  # fmt: skip
        plan = plan_run(settings, architecture)
        attach_roles(backbone, settings)
        for role, planned in (("student", plan.student), ("fake", plan.fake)):
            assert planned is not None
            assert_same_layers(planned.layers, roles.adapted_layers(backbone.network, role), f"{role} of the plan")
            assert planned.parameters == sum(p.numel() for p in roles.parameters(backbone.network, role).values())
        if family.traceable:
            assert plan.unknown == ""
            assert (plan.memory["plain"].activations or 0) > 0
        else:
            assert plan.unknown

    def test_a_scale_that_no_call_can_do_is_an_error(self, family):
        backbone = family.backbone()
        for scale in (0.5, float("nan")):
            with pytest.raises(WadiError, match=str(scale)):
                backbone.guided_call(scale)

    def test_conditional_and_null_in_one_batch_are_two_passes(self, family):
        backbone = family.backbone()
        condition, null = backbone.encode(PROMPTS), backbone.encode([""])
        x_t, t, _ = network_inputs(backbone)
        conditional = backbone.predict(x_t, t, condition)
        unconditional = backbone.predict(x_t, t, null.expand(2))
        assert (conditional - unconditional).abs().max() > 1e-4
        together = predict_guided(backbone, x_t, t, condition, null, 3.0)
        torch.testing.assert_close(together, backbone.guided(conditional, unconditional, 3.0), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(backbone.guided(conditional, unconditional, 1.0), conditional, rtol=1e-5, atol=1e-6)

    def test_a_prompts_condition_does_not_depend_on_its_neighbours(self, family):
        backbone = family.backbone()
        prompts = ["", "red apple", "a blue car in a green land"]
        together = backbone.encode(prompts)
        assert len(together) == 3
        for row, prompt in enumerate(prompts):
            alone = backbone.encode([prompt])
            assert alone.tensors.keys() == together.tensors.keys()
            for name, tensor in alone.tensors.items():
                row_of = together.tensors[name][row : row + 1]
                torch.testing.assert_close(tensor, row_of, rtol=1e-4, atol=1e-5, msg=naming(f"{name} of {prompt!r}"))
        assert [len(c) for c in (together[:1], Condition.cat([together, together]), together[:1].expand(4))] == [1, 6, 4]

    def test_images_and_latents_have_the_sizes_it_says(self, family):
        backbone = family.backbone()
        image = torch.rand(1, 3, *backbone.resolution)
        latent = backbone.encode_images(image)
        assert tuple(latent.shape[1:]) == backbone.latent_shape
        decoded = backbone.decode(latent)
        assert decoded.shape == image.shape
        assert decoded.dtype == latent.dtype == torch.float32
        assert 0 <= decoded.min() <= decoded.max() <= 1

    def test_encoding_images_inverts_decoding(self, family, monkeypatch):
        """The encoder's output reaches the decoder unchanged: scale, shift and moments cancel."""
        backbone = family.backbone()
        traffic = autoencoder_traffic(backbone.pipeline.vae, monkeypatch)
        images = torch.rand(3, 3, *backbone.resolution)
        latents = backbone.encode_images(images, batch=2)
        torch.testing.assert_close(torch.cat(traffic["images"]).reshape(images.shape), 2 * images - 1)
        raw = torch.cat(traffic["latents"])
        assert (latents - raw.reshape(latents.shape)).abs().max() > 0.01  # the config says something
        backbone.decode(latents)
        torch.testing.assert_close(traffic["decoded"][0], raw, rtol=1e-5, atol=1e-5)

    def test_an_autoencoder_that_overflows_in_half_precision_runs_in_single(self, family, monkeypatch):
        backbone = family.backbone()
        vae = backbone.pipeline.vae
        if "force_upcast" not in vae.config:
            pytest.skip(f"{type(vae).__name__} has no force_upcast")
        images = torch.rand(1, 3, *backbone.resolution)
        half = copy.deepcopy(vae).half()
        half.register_to_config(force_upcast=True)
        backbone.pipeline.register_modules(vae=copy.deepcopy(half).float())
        exact = backbone.encode_images(images)
        backbone.pipeline.register_modules(vae=half)
        traffic = autoencoder_traffic(half, monkeypatch)
        latents = backbone.encode_images(images)
        decoded = backbone.decode(latents)
        assert {tensor.dtype for tensor in [*traffic["images"], *traffic["latents"], *traffic["decoded"]]} == {torch.float32}
        assert half.dtype == torch.float16
        assert torch.equal(latents, exact)
        assert decoded.isfinite().all()

    def test_adapters_land_on_the_documented_layers(self, family):
        backbone = family.backbone()
        network = backbone.network
        leaves = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        attach_roles(backbone, config())
        for role, belongs in (("student", family.adapted), ("fake", family.fake)):
            found = roles.adapted_layers(network, role)
            assert_same_layers(found, [name for name, module in leaves if belongs(name, module)], f"adapter of the {role}")
            assert len(found) > 5

    def test_gradients_reach_every_angle(self, family):
        backbone = family.backbone()
        with_roles(backbone)
        gradients = student_gradients(backbone)
        dead = {roles.layer_of(n) for n, gradient in gradients.items() if gradient is None or not gradient.any()}
        assert_same_layers(dead, family.idle, "layers without a gradient (the family's `idle`)")

    def test_features_are_those_of_the_middle_block_with_and_without_checkpointing(self, family):
        """One row of channels for each token; the loss of a head on them has the same gradients if they are recomputed."""
        gradients = []
        for checkpointing in (False, True):
            backbone = family.backbone()
            with_roles(backbone, gradient_checkpointing=checkpointing)
            if not family.features:
                with pytest.raises(WadiError, match=type(backbone.network).__name__):
                    _ = backbone.feature_width
                return
            width = backbone.feature_width
            x_t, t, condition = network_inputs(backbone)
            networks = RoleNetworks(backbone, condition[:1])
            prediction, features = networks.fake_with_features(x_t, t, condition)
            assert (features.dtype, len(features), features.shape[2]) == (torch.float32, len(x_t), width)
            assert features.std(1).max() > 0  # tokens differ
            torch.testing.assert_close(prediction, networks.fake(x_t, t, condition))
            (features.square().mean() + prediction.square().mean()).backward()
            gradients.append({n: p.grad for n, p in roles.parameters(backbone.network, "fake").items()})
        for name, plain in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], plain, msg=naming(name))

    def test_gradient_checkpointing_changes_no_gradient(self, family):
        plain, checkpointed = family.backbone(), family.backbone()
        with_roles(plain)
        with_roles(checkpointed, gradient_checkpointing=True)
        recomputed = student_gradients(checkpointed)
        assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.network.modules())
        for name, gradient in student_gradients(plain).items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=naming(name))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_distillation_step_changes_student_and_fake_and_nothing_else(self, family, dtype):
        backbone = family.backbone(dtype)
        settings = with_roles(backbone, dtype=str(dtype).removeprefix("torch."))
        before = {name: tensor.clone() for name, tensor in all_tensors(backbone.network).items()}
        state = initial_state(backbone.network, settings, torch.device("cpu"))
        z, _, condition = network_inputs(backbone)
        batch = Batch(condition, backbone.encode([""]), z, z[:0])
        stats = train_step(backbone, batch, [EARLY], make_objective(settings), settings, state)
        assert all(value.isfinite().all() for value in stats.scalars().values())
        assert state.skipped == 0
        changed = {n for n, tensor in all_tensors(backbone.network).items() if not torch.equal(tensor, before[n])}
        angles = {n for n in before if n.startswith(ROLES) and roles.layer_of(n.partition(" ")[2]) not in family.idle}
        assert_same_layers(changed, angles, "parameters that a step changes")
        assert all(before[name].dtype == torch.float32 for name in angles)

    def test_bfloat16_predicts_nearly_the_same(self, family):
        exact, rounded = family.backbone(), family.backbone(torch.bfloat16)
        x_t, t, condition = network_inputs(exact)
        with torch.no_grad():
            reference, prediction = (b.predict(x_t, t, condition) for b in (exact, rounded))
        assert prediction.dtype == torch.float32
        assert (prediction - reference).norm() < 0.05 * reference.norm()
