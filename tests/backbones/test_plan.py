"""`wadi plan`: what it says is what a run does."""

import json
import shutil
from dataclasses import replace

import pytest
import small_pipelines
import torch

from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline, registry
from wadi.backbones.condition import Condition, as_list, from_list, sizes_and_dtype
from wadi.backbones.outline import NotInOutline, Outline
from wadi.backbones.sana import Sana
from wadi.cli.main import main
from wadi.diffusion import autoencoder
from wadi.distill.batch import Batch
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.objectives import make_objective
from wadi.distill.optimizers import initial_state
from wadi.distill.plan import fitting, plan
from wadi.distill.plan.architecture import read_architecture
from wadi.distill.plan.memory import LiveBytes, peak_bytes
from wadi.distill.plan.plan import outline_backbone, plan_role, plan_run, plan_to_dict
from wadi.distill.plan.text import describe_plan
from wadi.distill.setup import attach_roles
from wadi.distill.step import train_step
from wadi.roles import methods

CONFIG = DistillConfig(batch=4, student=StudentConfig(rank=16), fake=FakeConfig(rank=4, guidance_scale=1.0))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pixart-alpha", "sd3", "sana"])
def test_a_teachers_configs_tell_what_attaching_does(folder_of, name):
    config = replace(CONFIG, resolution=small_pipelines.RESOLUTIONS.get(name))
    found = read_architecture(str(folder_of(name)))
    outlined = outline_backbone(found, config)
    pipeline = load_pipeline(folder_of(name))
    backbone = from_pipeline(pipeline, config.resolution)
    others = [part for key, part in pipeline.components.items() if key.startswith(("text_encoder", "vae")) and part is not None]
    assert sum(found.other_parameters.values()) == sum(p.numel() for part in others for p in part.parameters())
    attach_roles(backbone, config)
    assert {key: v.shape for key, v in outlined.network.state_dict().items()} == {
        key: value.shape for key, value in backbone.network.state_dict().items()
    }
    for role in ("student", "fake"):
        planned_role = plan_role(outlined, role, getattr(config, role))
        angles = roles.parameters(backbone.network, role)
        assert planned_role.parameters == sum(p.numel() for p in angles.values())
        assert set(planned_role.layers) == {key.rsplit(".lorad_", 1)[0] for key in angles}
    encoded = backbone.encode(["red apple"]).tensors
    shapes = backbone.condition_shapes()
    assert shapes.keys() == encoded.keys()
    clip = {"prompt_embeds"} if name.startswith("sd") else set()  # the small tokenizer's texts are shorter than CLIP's 77
    for key in shapes.keys() - clip:
        sizes, dtype = sizes_and_dtype(shapes[key])
        assert sizes == tuple(encoded[key].shape[1:])
        assert dtype == encoded[key].dtype


@pytest.mark.parametrize("student", methods.METHODS)
def test_only_what_an_adapter_trains_is_counted(student, folder_of):
    """And the network's own parameters are the same for all."""
    targets = r".*attn1\.to_(q|k)"
    options = {"oft": {"oft_block_size": 4}, "road": {"group_size": 8}}.get(student, {})
    role = {"adapter": student, "rank": 2, "adapter_options": options, "target_modules": targets}
    config = replace(CONFIG, student=StudentConfig(**role), fake=FakeConfig(adapter="dora-frozen", rank=2))
    plan = plan_run(config, read_architecture(str(folder_of("sd1"))))
    backbone = from_pipeline(load_pipeline(folder_of("sd1")))
    assert plan.parameters == sum(parameter.numel() for parameter in backbone.network.parameters())
    attach_roles(backbone, config)
    state = initial_state(backbone.network, config, torch.device("cpu"))
    for name, planned in (("student", plan.student), ("fake", plan.fake)):
        assert planned.parameters == sum(p.numel() for group in state.trainable(name) for p in group)
        assert planned.adapter == getattr(config, name).adapter
    if student == "full":
        layers = (backbone.network.get_submodule(layer) for layer in plan.student.layers)
        assert plan.student.parameters == sum(layer.get_base_layer().weight.numel() for layer in layers)


def measured_peak(backbone, config):
    """Bytes at the largest moment of a real step, from the allocations that the profiler saw; weights included."""
    state = initial_state(backbone.network, config, torch.device("cpu"))
    condition, null = backbone.encode(["red apple"] * config.batch), backbone.encode([""])

    def step():
        z = torch.randn(config.batch, *backbone.latent_shape)
        train_step(backbone, Batch(condition, null, z, z[:0]), [700], make_objective(config), config, state)

    step()  # after the first one the optimisers hold their moments
    held = [*backbone.network.state_dict().values()]
    held += [m for o in state.optimizers.values() for s in o.state.values() for m in s.values() if m.ndim]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    now = peak = sum(tensor.untyped_storage().nbytes() for tensor in held)
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_the_estimate_is_the_measured_peak(tmp_path, family, checkpointing):
    if family == "sd":
        import tiny

        # attention in both levels, so that checkpointing has something to save
        pipeline = tiny.stable_diffusion(
            tmp_path, sample_size=32, block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        )  # fmt: skip
    else:
        from diffusers import PixArtSigmaPipeline

        pipeline = small_pipelines._pixart(
            PixArtSigmaPipeline,
            sample_size=32,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            cross_attention_dim=128,
        )
    config = replace(CONFIG, gradient_checkpointing=checkpointing)
    backbone = from_pipeline(pipeline)
    attach_roles(backbone, config)
    shapes = {key: tuple(value.shape[1:]) for key, value in backbone.encode([""]).tensors.items()}
    measured = measured_peak(backbone, config)
    estimated = peak_bytes(backbone, config, make_objective(config), shapes, 700)
    assert 0.85 < estimated / measured < 1.15


def test_live_bytes_are_counted_once_and_forgotten():
    with LiveBytes() as live:
        x = torch.ones(1000)
        y = x[:500]  # a view
        assert live.now == 4000
        z = x + 1
        assert live.now == 8000
        del z
        assert live.now == 4000
        del x, y
    assert (live.now, live.peak) == (0, 8000)


def test_the_command_prints_the_plan_and_its_json(folder_of, capsys):
    teacher = str(folder_of("sd1"))
    small = ["plan", "--teacher", teacher, "--student.rank", "4", "--fake.rank", "2", "--batch", "2", "--processes", "3"]
    assert main([*small, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    planned = plan_run(
        replace(DistillConfig(batch=2), student=StudentConfig(rank=4), fake=FakeConfig(rank=2)),
        read_architecture(teacher),
        3,
    )
    assert printed == json.loads(json.dumps(plan_to_dict(planned)))
    for parts in printed["memory"].values():
        assert parts["total"] == sum(value for part, value in parts.items() if part != "total")
        assert min(parts.values()) > 0
    assert printed["memory"]["checkpointed"]["activations"] < printed["memory"]["plain"]["activations"]
    text = describe_plan(planned)
    assert f"{planned.student.parameters:,} trainable" in text
    assert "3 processes, 6 images per step" in text


def test_what_settings_change_of_the_memory(folder_of):
    found = read_architecture(str(folder_of("sd3")))
    plain, accumulated, eight_bit, sharded, averaged = (
        plan_run(replace(CONFIG, **changes), found, processes=4).memory["plain"]
        for changes in (
            {},
            {"accumulate": 3},
            {"optimizer": "adamw8bit"},
            {"shard": True},
            {"student": StudentConfig(rank=16, ema=0.9)},
        )
    )
    assert accumulated.gradients == plain.gradients
    assert accumulated.activations > plain.activations  # gradients of the batches before lie beside them
    assert eight_bit.optimizer * 4 == plain.optimizer
    assert plain.network / 4 < sharded.network < plain.network
    assert averaged.adapters - plain.adapters == plain.gradients  # a copy of the student's angles, as large as their gradients


@pytest.mark.slow
def test_the_command_of_the_readme(capsys):
    assert main(["plan", "--preset", "sd15", "--student.rank", "128", "--batch", "1"]) == 0
    assert "rank 128, 182 layers, 41,897,984 trainable" in capsys.readouterr().out


def schedule(start, end, scaled=True):
    """``sigma / alpha`` of a schedule of 1000 betas at its last timestep, computed apart from the package."""
    kept = 1.0
    for i in range(1000):
        share = i / 999
        beta = (start**0.5 + share * (end**0.5 - start**0.5)) ** 2 if scaled else start + share * (end - start)
        kept *= 1 - beta
    return ((1 - kept) / kept) ** 0.5


def test_amplification_is_that_of_known_schedules(folder_of, monkeypatch):
    monkeypatch.setattr(plan, "measure_memory", lambda *_: (plan.Memory(0, 0, 0, 0, 0, None), ""))  # which takes seconds
    small = replace(CONFIG, batch=1)
    found = read_architecture(str(folder_of("sd1")))
    sd = found.scheduler | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    assert plan_run(small, replace(found, scheduler=sd)).amplification == pytest.approx(14.6, abs=0.05)
    assert plan_run(small, replace(found, scheduler=sd)).amplification == pytest.approx(schedule(0.00085, 0.012), rel=1e-3)
    linear = sd | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    assert plan_run(small, replace(found, scheduler=linear)).amplification == pytest.approx(
        schedule(0.0001, 0.02, scaled=False), rel=1e-2
    )
    velocity = sd | {"prediction_type": "v_prediction"}
    kept = 1 / (1 + schedule(0.00085, 0.012) ** 2)
    assert plan_run(small, replace(found, scheduler=velocity)).amplification == pytest.approx((1 - kept) ** 0.5, rel=1e-4)
    assert plan_run(replace(small, resolution=small_pipelines.RESOLUTIONS.get("sd3")),
                     read_architecture(str(folder_of("sd3")))).amplification == 1.0  # fmt: skip


def test_bytes_and_images_are_those_of_the_settings(folder_of):
    found = read_architecture(str(folder_of("sd1")))
    wide = plan_run(replace(CONFIG, batch=2, accumulate=3), found, processes=5)
    narrow = plan_run(replace(CONFIG, batch=2, accumulate=3, dtype="bfloat16"), found, processes=5)
    assert (wide.images, narrow.images, wide.batch, wide.processes) == (30, 30, 2, 5)
    encoders = sum(found.other_parameters.values())
    assert wide.memory["plain"].network == 4 * wide.parameters
    assert narrow.memory["plain"].network == 2 * narrow.parameters == 2 * wide.parameters
    assert (wide.memory["plain"].encoders, narrow.memory["plain"].encoders) == (4 * encoders, 2 * encoders)
    trained = wide.student.parameters + wide.fake.parameters
    for planned in (wide, narrow):  # angles are float32 always, and so are their gradients and two moments
        memory = planned.memory["plain"]
        assert (memory.adapters, memory.optimizer, memory.gradients) == (4 * trained, 8 * trained, 4 * wide.student.parameters)


ABSURD = [
    ("unet/config.json", "block_out_channels", (None, [], [0, 0], [10**9, 10**9], "x", -1)),
    ("unet/config.json", "attention_head_dim", (None, 0)),
    ("unet/config.json", "in_channels", (10**12,)),
    ("unet/config.json", "sample_size", (None, -1, [16], "x", 10**9)),
    ("unet/config.json", "layers_per_block", (10**6,)),
    ("vae/config.json", "block_out_channels", (None, [], 5)),
    ("scheduler/scheduler_config.json", "num_train_timesteps", (None, 0, -1, "x", 10**12)),
    ("scheduler/scheduler_config.json", "beta_end", (None, "x")),
    ("model_index.json", "text_encoder", (["transformers", None], ["transformers", "os"], ["a"], [1, 2])),
    ("model_index.json", "vae", (["diffusers", "AutoencoderKL", "x"],)),
    ("text_encoder/config.json", "hidden_size", (None, "x")),
    ("text_encoder/config.json", "num_hidden_layers", (10**7,)),
]


@pytest.mark.parametrize(("file", "key", "value"), [(f, k, v) for f, k, values in ABSURD for v in values])
def test_null_and_absurd_values_in_configs_are_bad_input(file, key, value, folder_of, tmp_path, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(folder_of("sd1"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {key: value}))
    code = main(["plan", "--teacher", str(folder), "--student.rank=2", "--fake.rank=1"])
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err


def test_the_plan_is_all_that_is_printed(folder_of, capfd):
    assert main(["plan", "--teacher", str(folder_of("sd1")), "--student.rank=2", "--fake.rank=1"]) == 0
    printed = capfd.readouterr()
    assert "float32: []" not in printed.out + printed.err
    assert printed.err == ""


def test_gradients_of_earlier_batches_are_held_from_the_second_on(folder_of):
    """For any number of batches in a step, memory holds one set of gradients and the current batch."""
    found = read_architecture(str(folder_of("sd1")))
    config = replace(CONFIG, resolution=small_pipelines.RESOLUTIONS.get("sd1"))
    one, two, three = (plan_run(replace(config, accumulate=n), found).memory["plain"].total for n in (1, 2, 3))
    assert two == three
    assert one < two


class Counting(Sana):
    """Cuts the prompts to the longest one of the batch, so the shapes of a step depend on the prompts."""

    def predict(self, x_t, t, condition):
        longest = int(condition.tensors["mask"].sum(1).max())
        return super().predict(x_t, t, Condition({name: tensor[:, :longest] for name, tensor in condition.tensors.items()}))


class Masking(Sana):
    """Needs a mask of its own dtype: ``~`` does not work on floats."""

    def predict(self, x_t, t, condition):
        hidden = ~condition.tensors["mask"]
        return super().predict(x_t, t, Condition({**condition.tensors, "mask": (hidden + 2)}))


class Silent(Sana):
    """Does not say what a condition looks like."""

    condition_shapes = registry.Backbone.condition_shapes


class Asking(Sana):
    """Reads the tokenizer where there is none."""

    def condition_shapes(self):
        return {"prompt_embeds": (self.pipeline.tokenizer.model_max_length, self.network.config.caption_channels)}


class Stating(Sana):
    """States the scale of an autoencoder that the package does not know."""

    @classmethod
    def autoencoder_scale(cls, config):
        return 2 ** len(config["stages"])


WORDS = ["--student.rank=2", "--fake.rank=2", "--batch=2"]


@pytest.mark.parametrize(("backbone", "reason"), [(Counting, "SanaTransformer2DModel"), (Silent, "condition_shapes")])
def test_everything_else_is_printed_where_the_activations_are_unknown(folder_of, capsys, monkeypatch, backbone, reason):
    teacher = str(folder_of("sana"))
    words = ["plan", "--teacher", teacher, *WORDS]
    assert main([*words, "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["unknown"] == ""
    monkeypatch.setitem(registry.FAMILIES, "SanaPipeline", backbone)
    assert main([*words, "--json"]) == 0
    unknown = json.loads(capsys.readouterr().out)
    assert reason in unknown["unknown"]
    for name, memory in unknown["memory"].items():
        assert (memory.pop("activations"), memory.pop("total")) == (None, None)
        assert memory == {part: known["memory"][name][part] for part in memory}
    assert {key: unknown[key] for key in known if key not in ("memory", "unknown")} == {
        key: known[key] for key in known if key not in ("memory", "unknown")
    }
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.count("unknown") >= 3
    assert reason in printed.out
    assert printed.err == ""
    assert fitting.suggest_settings(DistillConfig(teacher=teacher, batch=2), torch.device("cpu")) == ""


def test_masks_have_their_dtype_in_the_plan(folder_of, monkeypatch):
    found = read_architecture(str(folder_of("sana")))
    monkeypatch.setitem(registry.FAMILIES, "SanaPipeline", Masking)
    assert plan_run(CONFIG, found).unknown == ""


def test_a_family_that_needs_the_pipeline_for_the_plan_is_told_so(folder_of, monkeypatch, capsys):
    monkeypatch.setitem(registry.FAMILIES, "SanaPipeline", Asking)
    assert main(["plan", "--teacher", str(folder_of("sana")), *WORDS]) == 2
    error = capsys.readouterr().err
    assert "pipeline.tokenizer" in error
    assert len(error.splitlines()) == 1
    outline = Outline(pipeline_class="FluxPipeline")
    assert outline._pack_latents(torch.zeros(1, 4, 8, 8), 1, 4, 8, 8).shape == (1, 16, 16)  # needs no pipeline
    with pytest.raises(NotInOutline, match="encode_prompt"):
        _ = outline.encode_prompt
    assert not hasattr(outline, "text_encoder")


def test_a_family_states_the_scale_of_its_autoencoder(folder_of, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(folder_of("sana"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["encoder_block_out_channels"]
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "stages": [1, 2, 3]}))
    assert main(["plan", "--teacher", str(folder), *WORDS]) == 2
    assert "autoencoder_scale" in capsys.readouterr().err
    monkeypatch.setitem(registry.FAMILIES, "SanaPipeline", Stating)
    assert read_architecture(str(folder)).vae_scale_factor == 8


def test_lists_of_embeddings_become_rows_and_lists_again():
    rows = [torch.randn(length, 4) for length in (3, 1, 5)]
    condition = Condition(from_list(rows, tokens=6))
    assert condition.tensors["prompt_embeds"].shape == (3, 6, 4)
    assert condition.tensors["mask"].sum(1).tolist() == [3, 1, 5]
    assert all(torch.equal(back, row) for back, row in zip(as_list(condition), rows, strict=True))
    assert [len(row) for row in as_list(Condition.cat([condition[1:2], condition[:1]]))] == [1, 3]
    again = condition.to(torch.float32)  # as a cache of embeddings may return it
    assert [len(row) for row in as_list(again)] == [3, 1, 5]


def test_an_autoencoder_of_videos_takes_an_image_as_one_frame():
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 1.5, 2.0],
    ).eval()  # fmt: skip
    images = torch.rand(3, 3, 16, 32)
    latents = autoencoder.encode(vae, images, batch=2)
    assert latents.shape == (3, 4, 16 // autoencoder.scale_of(vae.config), 32 // autoencoder.scale_of(vae.config))
    with torch.no_grad():
        raw = vae.encode(2 * images.unsqueeze(2) - 1).latent_dist.mode()[:, :, 0]
        mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        torch.testing.assert_close(latents, (raw - mean) / std)
        decoded = autoencoder.decode(vae, latents)
        expected = vae.decode(raw.unsqueeze(2)).sample[:, :, 0]
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
