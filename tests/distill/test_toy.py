"""A rehearsal in two dimensions: the loop's own step turns a teacher of two islands into a one-step generator of both.

The teacher, a small network trained here for a second or so, predicts the noise of samples around ``(-1, 0)`` and ``(1, 0)``.
Asked once, at a late timestep, it answers with the mean of all: neither island. What the student draws in one step after some
hundred updates, angles only, has to lie on the islands, on both, and closer to the data by a measure of whole distributions.
"""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import tiny
from wadi import roles
from wadi.backbones import Condition
from wadi.diffusion.process import Process
from wadi.distill import loop, setup
from wadi.distill.batch import Batch
from wadi.distill.objectives import make_objective
from wadi.distill.optimizers import initial_state
from wadi.sampling import one_step

TIMESTEP = 700


class Network(nn.Module):
    """``eps(x_t, t)`` on ``(B, 2, 1, 1)``."""

    def __init__(self, width=48):
        super().__init__()
        self.first, self.second = nn.Linear(2 + 8, width), nn.Linear(width, width)
        self.third, self.last = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x_t, t):
        phase = t.float()[:, None] / 1000 * torch.tensor([1.0, 2.0, 4.0, 8.0]) * torch.pi / 2
        hidden = torch.cat([x_t.flatten(1), phase.sin(), phase.cos()], 1)
        for layer in (self.first, self.second, self.third):
            hidden = nn.functional.silu(layer(hidden))
        return self.last(hidden).reshape(x_t.shape)


class Islands:
    """A backbone without pictures: what `loop.train_step` needs of one."""

    student_targets = fake_targets = "first|second|third|last"
    latent_shape = (2, 1, 1)

    def __init__(self):
        torch.manual_seed(0)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.process = Process.from_scheduler(DDIMScheduler(**betas))
        self.network = Network()

    def predict(self, x_t, t, condition):
        return self.network(x_t, t)

    def as_seen(self, x_t):
        return x_t


def islands(count):
    side = torch.randint(0, 2, (count, 1)) * 2.0 - 1
    return (torch.cat([side, torch.zeros_like(side)], 1) + 0.15 * torch.randn(count, 2)).reshape(count, 2, 1, 1)


def taught():
    backbone = Islands()
    optimizer = torch.optim.Adam(backbone.network.parameters(), lr=3e-3)
    for _ in range(1000):
        x0, t = islands(256), torch.randint(0, 1000, (256,))
        noise = torch.randn_like(x0)
        loss = (backbone.predict(backbone.process.add_noise(x0, noise, t), t, None) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone


@torch.no_grad()
def drawn(backbone, role, count=1024):
    with roles.active(backbone.network, role):
        return one_step(backbone, None, torch.randn(count, 2, 1, 1), TIMESTEP)


def energy_distance(one, other):
    """Twice the mean distance across less the mean distances within; 0 only for equal distributions."""
    one, other = one.flatten(1), other.flatten(1)
    return (2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean()).item()


@pytest.fixture(scope="module")
def teacher():
    return taught()


@pytest.mark.parametrize("objective", ["vsd", "dmd"])
def test_the_student_finds_both_islands(objective, teacher):
    backbone = copy.deepcopy(teacher)
    config = tiny.settings(
        "t", "p", "o", steps=250, batch=128, guidance_scale=1.0, lr_schedule="cosine",
        objective=objective, student={"rank": 8, "lr": 1e-2},
        fake={"rank": 8, "lr": 1e-2, "guidance_scale": 1.0, "updates": 2, "weighting": "none"},
    )  # fmt: skip
    torch.manual_seed(1)
    losses = make_objective(config)
    setup.attach_roles(backbone, config)
    state = initial_state(backbone.network, config, torch.device("cpu"))
    nothing = Condition({"nothing": torch.zeros(config.batch, 1)})
    data, forced = islands(1024), drawn(backbone, None)
    for _ in range(config.steps):
        z = torch.randn(config.batch, 2, 1, 1, generator=state.generator)
        loop.train_step(backbone, Batch(nothing, nothing[:1], z, z[:0]), [TIMESTEP], losses, config, state)
        state.step += 1
    student = drawn(backbone, "student")
    before, after = energy_distance(forced, data), energy_distance(student, data)
    x = student[:, 0].flatten()
    assert after < before / 3, (before, after)
    assert (x.abs() > 0.5).float().mean() > 0.5  # on an island, not between
    assert 0.3 < (x > 0).float().mean() < 0.7  # on both
