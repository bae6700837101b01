"""Statistics of a run's health equal their definitions; a warning appears for each sign of trouble, and only then."""

import math
import re

import pytest
import torch
from torch import nn

from wadi import roles
from wadi.distill import health
from wadi.lorad import LoRaDConfig


def test_distance_by_quarter_of_the_schedule():
    real, fake = torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    fake[0], fake[1], fake[2], fake[3] = 1.0, 3.0, -2.0, 5.0
    sums = health.distance_sums(real, fake, torch.tensor([0, 249, 250, 999]), 1000)
    distances = health.distance_by_timestep(sums)
    assert distances == pytest.approx(
        {"teacher_fake_distance_q1": 2.0, "teacher_fake_distance_q2": 2.0, "teacher_fake_distance_q4": 5.0}
    )
    halves = zip(real.split(2), fake.split(2), torch.tensor([0, 249, 250, 999]).split(2), strict=True)
    assert (
        health.distance_by_timestep(sum(health.distance_sums(*half, 1000) for half in halves)) == distances
    )  # sums can be added


def test_diversity_is_the_mean_distance_within_a_prompt():
    images = torch.zeros(2, 3, 3, 4, 4)
    images[0, 1], images[0, 2] = 0.5, 1.0  # distances 0.5, 1.0, 0.5; the second prompt's images are one
    assert health.pixel_diversity(images) == pytest.approx((2 / 3 + 0) / 2)
    assert math.isnan(health.pixel_diversity(images[:, :1]))
    # two prompts apart from each other do not count as diversity
    images[1] = 1.0
    assert health.pixel_diversity(images) == pytest.approx((2 / 3 + 0) / 2)


def test_contrast_is_the_spread_of_pixels():
    images = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([image.flatten().std() for image in images.flatten(0, 1)]).mean()
    assert health.pixel_contrast(images) == pytest.approx(expected.item())


def test_angle_stats_are_those_of_theta():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    roles.attach(model, "student", LoRaDConfig(r=2, target_modules=r"\d"))
    thetas = []
    for name, parameter in roles.parameters(model, "student").items():
        nn.init.normal_(parameter, std=0.1)
        if name.endswith("A"):
            thetas.append(parameter)
        else:
            thetas[-1] = (thetas[-1] @ parameter).detach()
    theta = torch.cat([theta.flatten() for theta in thetas])
    assert theta.numel() == 5 * 3 + 4 * 2
    assert health.angle_stats(model, "student") == pytest.approx(
        {
            "student_angle_rms": theta.square().mean().sqrt().item(),
            "student_angle_max": theta.abs().max().item(),
            "student_angle_share_above_1e-3": (theta.abs() > 1e-3).float().mean().item(),
        }
    )


@pytest.mark.parametrize(
    ("stats", "values"),
    [
        ({"diversity_ratio": 0.3}, ("30%", "student.lr", "fake.updates", "warm_start.weight")),
        ({"contrast_ratio": 0.4}, ("40%", "student.timesteps")),
        ({"contrast_ratio": 2.5}, ("250%", "guidance_scale")),
        ({"student_angle_max": 4.0}, ("4.0 rad", "student.lr")),
    ],
)
def test_a_warning_has_the_value_and_the_settings_to_try(stats, values):
    (warning,) = health.warnings(stats, [])
    assert [value for value in values if value not in warning] == []


def test_divergence_and_skipped_steps_give_a_warning():
    near, far = ([{"teacher_fake_distance_q1": value, "skipped": 0}] * 100 for value in (0.1, 0.5))
    assert health.warnings(near[0], near + near) == []
    (warning,) = health.warnings(far[0], near + far)
    assert "guidance_scale" in warning
    assert health.warnings({"skipped": 5}, near) == []
    assert re.findall(r"\d+", health.warnings({"skipped": 12}, near)[0])[0] == "12"
    # steps skipped earlier than the last hundred do not count
    later = [{"teacher_fake_distance_q1": 0.1, "skipped": 12}] * 100
    assert health.warnings({"skipped": 20}, near + later) == []
    assert re.findall(r"\d+", health.warnings({"skipped": 26}, near + later)[0])[0] == "14"


def test_peak_memory_is_counted():
    before = health.peak_memory(torch.device("cpu"))
    kept = torch.ones(2**25)  # 128 MiB
    assert health.peak_memory(torch.device("cpu")) >= max(before, kept.nbytes / 2**20)


def test_a_rising_loss_of_the_fake_model_gives_a_warning():
    falling = [{"loss_fake": 1.0 - i / 1000} for i in range(400)]
    rising = [{"loss_fake": 0.1 + (i > 300) * 0.2} for i in range(400)]
    assert health.warnings({}, falling) == []
    assert "fake.updates" in health.warnings({}, rising)[0]


@pytest.mark.parametrize("ratio", [0.61, 1 / 0.61])
def test_contrast_may_be_off_by_the_same_factor_either_way(ratio):
    assert health.warnings({"contrast_ratio": ratio}, []) == []
    assert len(health.warnings({"contrast_ratio": ratio**1.1}, [])) == 1


def test_a_healthy_run_has_no_warning():
    healthy = {"diversity_ratio": 0.9, "contrast_ratio": 1.1, "student_angle_max": 0.5, "loss_fake": 0.2}
    assert health.warnings(healthy, [{"loss_fake": 0.2}] * 500) == []
    assert health.warnings({}, []) == []
