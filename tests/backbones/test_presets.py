"""Presets and the networks they are for: the layers and numbers of the paper, from configs alone."""

from dataclasses import replace

import pytest
import torch

from wadi.diffusion.process import Process
from wadi.diffusion.schedulers import is_flow, make_scheduler, student_scheduler
from wadi.distill.config_files import flat_settings, from_dict, to_dict
from wadi.distill.plan.architecture import known_architectures, load_architecture
from wadi.distill.plan.plan import outline_backbone, plan_role
from wadi.distill.presets import MODELS, ONE_GPU, OURS, PAPERS, PRESETS

# Parameters of the public models.
SIZES = {
    "sd15": 859_520_964, "sd21-base": 865_910_724, "sd21": 865_910_724, "pixart-alpha-256": 610_856_096,
    "pixart-alpha-512": 610_856_096, "pixart-sigma": 610_856_096, "sdxl": 2_567_463_684, "sd3": 2_243_171_520,
    "flux": 11_901_408_320, "sana": 1_604_462_752, "z-image": 6_154_908_736, "lumina2": 2_609_769_152, "chroma": 8_899_983_424,
    "qwen-image": 20_430_401_088, "flux2": 32_223_281_152, "flux2-klein": 3_875_544_576,
}  # fmt: skip


@pytest.fixture(scope="module")
def outlines():
    outlines = {}

    def outline(name):
        if name not in outlines:
            outlines[name] = outline_backbone(load_architecture(name), replace(PRESETS[name], gradient_checkpointing=False))
        return outlines[name]

    return outline


def test_every_model_preset_has_an_architecture():
    assert {*PAPERS, *OURS} == set(known_architectures()) == set(SIZES)
    assert set(MODELS.values()) == set(SIZES)
    assert {*PAPERS, *OURS, *ONE_GPU} == set(MODELS)
    for preset in PRESETS.values():
        assert from_dict(to_dict(preset)) == preset
        assert "resolution" in flat_settings(to_dict(preset))


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("flux", "flux2")])
def test_networks_are_the_public_ones(outlines, name):
    network = outlines(name).network
    assert sum(p.numel() for n, p in network.named_parameters() if "lorad_" not in n) == SIZES[name]
    assert all(p.is_meta for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "rank", "layers", "parameters"),
    [
        ("sd15", 64, 182, 20_948_992),
        ("sd15", 128, 182, 41_897_984),
        ("sd15", 256, 182, 83_795_968),
        ("sd15", 512, 182, 167_591_936),
        ("sd21-base", 256, 214, 94_429_184),
        ("pixart-alpha-256", 128, 283, 81_219_584),
    ],
)
def test_the_papers_trainable_parameters(outlines, name, rank, layers, parameters):
    preset = PRESETS[name]
    if preset.student.rank == rank:
        backbone = outlines(name)
    else:
        changed = replace(preset, gradient_checkpointing=False, student=replace(preset.student, rank=rank))
        backbone = outline_backbone(load_architecture(name), changed)
    role = plan_role(backbone, "student", preset.student)
    assert (len(role.layers), role.parameters) == (layers, parameters)
    fake = plan_role(backbone, "fake", preset.fake)
    assert set(fake.layers) < set(role.layers)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_student_generates_where_errors_stay_small(name):
    """At most 15-fold: what the paper had, and never the 157 that PixArt has at 999."""
    scheduler = make_scheduler(load_architecture(name).scheduler)
    process = Process.from_scheduler(scheduler)
    timestep = torch.tensor([(PRESETS[name].student.timesteps or [process.last_timestep])[0]])
    divided = process.alpha(timestep) if process.prediction == "epsilon" else torch.ones(1)
    assert process.sigma(timestep) / divided < 15
    assert is_flow(scheduler) == (process.prediction == "velocity")


@pytest.mark.parametrize("name", ONE_GPU)
def test_four_steps_can_be_exported(name):
    """The model's own scheduler has these timesteps."""
    scheduler = student_scheduler(make_scheduler(load_architecture(MODELS[name]).scheduler), PRESETS[name].student.timesteps)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_pixarts_timestep_is_where_its_own_schedule_has_the_authors_constant():
    from wadi.convert.authors import ALPHA_SQUARED

    process = Process.from_scheduler(make_scheduler(load_architecture("pixart-alpha-256").scheduler))
    squared = process.alpha(torch.arange(1000)) ** 2
    assert int((squared < ALPHA_SQUARED).nonzero()[0]) == PRESETS["pixart-alpha-256"].student.timesteps[0]
