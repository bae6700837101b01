"""`wadi plan`: what it says is what a run does."""

import json
import shutil
from dataclasses import replace

import pytest
import small_pipelines
import torch

from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.distill.batch import Batch
from wadi.distill.config import DistillConfig, FakeConfig, StudentConfig
from wadi.distill.objectives import make_objective
from wadi.distill.optimizers import initial_state
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
        assert shapes[key] == tuple(encoded[key].shape[1:])


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


def test_amplification_is_that_of_known_schedules(folder_of):
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
