"""Noising process: conversions are inverse to each other and agree with diffusers' own arithmetic."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wadi.diffusion.process import Prediction, Process
from wadi.errors import WadiError

KINDS = get_args(Prediction)
SHAPE = (3, 4, 2, 2)


def vp(prediction="epsilon", **config):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction, **config
    )


def flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def normal(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("make", [vp, flow])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(t=st.lists(st.integers(1, 998), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_split_and_join_are_inverse(make, kind, t, seed):
    process, t = Process.from_scheduler(make()), torch.tensor(t)
    x0, eps = normal(seed), normal(seed + 1000)
    x_t = process.add_noise(x0, eps, t)
    prediction = process.join(x0, eps, t, kind)
    x0_again, eps_again = process.split(prediction, x_t, t, kind)
    # dividing by alpha (or, for the noise, by sigma) is all that rounding can grow by
    alpha, sigma = process.alpha(t).min().item(), process.sigma(t).min().item()
    assert x0_again.dtype == eps_again.dtype == torch.float64
    torch.testing.assert_close(x0_again, x0, atol=1e-14 / alpha, rtol=1e-12)
    torch.testing.assert_close(eps_again, eps, atol=1e-14 / sigma, rtol=1e-12)


@pytest.mark.parametrize("make", [vp, flow])
def test_alpha_and_sigma_are_the_schedule_in_float32(make):
    scheduler = make()
    process, t = Process.from_scheduler(scheduler), torch.arange(1000)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float32
    if process.alphas is None:
        torch.testing.assert_close(alpha + sigma, torch.ones(1000))
        torch.testing.assert_close(sigma[250], torch.tensor(0.25))
    else:
        cumprod = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(alpha.double(), cumprod.sqrt(), rtol=1e-7, atol=0)
        torch.testing.assert_close(sigma.double(), (1 - cumprod).sqrt(), rtol=1e-4, atol=0)
        assert (alpha[1:] < alpha[:-1]).all()
        assert (sigma[1:] > sigma[:-1]).all()


def test_sigma_is_exact_where_hardly_any_noise_is():
    """At early timesteps ``1 - alpha^2`` in float32 loses three of seven digits."""
    process = Process.from_scheduler(vp())
    t = torch.arange(20)
    alpha, sigma = process.alpha(t).double(), process.sigma(t).double()
    torch.testing.assert_close(sigma, (1 - alpha**2).sqrt(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [1, 250, 999])
def test_x0_and_eps_agree_with_ddim(kind, t):
    scheduler = vp(kind, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    process = Process.from_scheduler(scheduler)
    x_t, prediction = normal(0, torch.float32), normal(1, torch.float32)
    times = torch.full((3,), t)
    x0 = process.x0(prediction, x_t, times)
    stepped = scheduler.step(prediction, t, x_t)
    torch.testing.assert_close(x0, stepped.pred_original_sample, rtol=1e-4, atol=1e-4)
    # one DDIM step is the two estimates noised again, one timestep earlier
    again = process.add_noise(x0, process.eps(prediction, x_t, times), times - 1)
    torch.testing.assert_close(again, stepped.prev_sample, rtol=1e-4, atol=1e-4)


def test_add_noise_agrees_with_the_schedulers():
    scheduler, t = vp(), torch.tensor([0, 400, 999])
    x0, noise = normal(0, torch.float32), normal(1, torch.float32)
    torch.testing.assert_close(Process.from_scheduler(scheduler).add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    scheduler = flow()
    t = scheduler.timesteps[[999, 600, 0]]
    torch.testing.assert_close(Process.from_scheduler(scheduler).add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind):
    process, t = Process.from_scheduler(vp()), torch.tensor([3, 400, 999])
    low = [normal(seed, torch.bfloat16) for seed in range(2)]
    high = [tensor.float() for tensor in low]
    for got, expected in (
        (process.add_noise(*low, t), process.add_noise(*high, t)),
        (process.join(*low, t, kind), process.join(*high, t, kind)),
        (process.split(*low, t, kind)[0], process.split(*high, t, kind)[0]),
        (process.split(*low, t, kind)[1], process.split(*high, t, kind)[1]),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_prediction_type_comes_from_the_scheduler():
    assert [Process.from_scheduler(vp(kind)).prediction for kind in ("epsilon", "v_prediction", "sample")] == [
        "epsilon", "v_prediction", "sample",
    ]  # fmt: skip
    assert Process.from_scheduler(flow()).prediction == "velocity"


def test_the_schedule_is_the_models_own():
    """Zero terminal signal, another length, another table: nothing is assumed."""
    process = Process.from_scheduler(vp("v_prediction", rescale_betas_zero_snr=True))
    last = torch.tensor([999])
    assert process.alpha(last).item() == 0
    x_t, v = normal(0)[:1], normal(1)[:1]
    torch.testing.assert_close(process.x0(v, x_t, last), -v)
    assert Process.from_scheduler(vp(num_train_timesteps=50)).num_timesteps == 50


def test_where_a_prediction_determines_an_image():
    for kind in ("epsilon", "v_prediction"):
        assert Process.from_scheduler(vp(kind)).last_determined == 999
    assert Process.from_scheduler(flow()).last_determined == 1000
    noise = Process.from_scheduler(vp("epsilon", rescale_betas_zero_snr=True))
    assert 900 < noise.last_determined < 999
    assert noise.alpha(torch.tensor([noise.last_determined])) >= 1e-3 > noise.alpha(torch.tensor([noise.last_determined + 1]))
    assert Process.from_scheduler(vp("v_prediction", rescale_betas_zero_snr=True)).last_determined == 999


def test_other_schedulers_are_errors():
    from diffusers import EDMEulerScheduler

    with pytest.raises(WadiError, match="EDMEulerScheduler"):
        Process.from_scheduler(EDMEulerScheduler())
    odd = SimpleNamespace(config=dict_with_attributes(num_train_timesteps=10, prediction_type="score"), alphas_cumprod=[0.5])
    with pytest.raises(WadiError, match="score"):
        Process.from_scheduler(odd)


class dict_with_attributes(dict):
    __getattr__ = dict.__getitem__
