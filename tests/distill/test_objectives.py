"""Objectives: equal to their definitions, whatever the network predicts."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from wadi.diffusion.process import Prediction, Process, per_sample
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.objectives.regression import regression_loss
from wadi.distill.objectives.score import dmd_gradient, gradient_loss, vsd_gradient

SHAPE = (4, 3, 2, 2)
T = torch.tensor([20, 300, 700, 979])


def process_of(kind):
    if kind == "velocity":
        return Process.from_scheduler(FlowMatchEulerDiscreteScheduler())
    return Process.from_scheduler(DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind))


def gradient_of(objective, x0, *arguments):
    return vsd_gradient(*arguments) if objective == "vsd" else dmd_gradient(x0, *arguments)


def tensors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.fixture(params=get_args(Prediction))
def process(request):
    return process_of(request.param)


def test_sigma2_is_its_definition_for_every_prediction_type(process):
    """Two estimates of the noise at one ``x_t``, told in whichever way the network speaks."""
    x_t, eps_real, eps_fake = tensors(3)
    alpha, sigma = (per_sample(value, x_t).double() for value in (process.alpha(T), process.sigma(T)))
    x0_real, x0_fake = ((x_t - sigma * eps) / alpha for eps in (eps_real, eps_fake))
    real, fake = process.join(x0_real, eps_real, T), process.join(x0_fake, eps_fake, T)
    g = vsd_gradient(x_t, T, real, fake, process)
    assert_close(g, sigma**2 * (eps_real - eps_fake))
    assert_close(g, sigma * alpha * (x0_fake - x0_real))


def test_dmd_is_the_distance_of_the_images_over_the_teachers_error(process):
    x0, x_t, real, fake = tensors(4)
    x0_real, x0_fake = process.x0(real, x_t, T), process.x0(fake, x_t, T)
    g = dmd_gradient(x0, x_t, T, real, fake, process)
    for row in range(len(x0)):
        error = (x0[row] - x0_real[row]).abs().mean()
        assert_close(g[row], (x0_fake[row] - x0_real[row]) / error)


def test_dmd_at_an_exact_teacher_is_finite(process):
    (x0,) = tensors(1)
    x_t = process.add_noise(x0, tensors(1, 1)[0], T)
    exact = process.join(x0, (x_t - per_sample(process.alpha(T), x_t) * x0) / per_sample(process.sigma(T), x_t), T)
    assert dmd_gradient(x0, x_t, T, exact, exact, process).isfinite().all()


@pytest.mark.parametrize("objective", ["vsd", "dmd"])
def test_the_gradient_moves_the_image_from_the_fake_models_towards_the_teachers(process, objective):
    x0, noise, x0_real, x0_fake = tensors(4)
    x_t = process.add_noise(x0, noise, T)
    alpha, sigma = (per_sample(value, x_t).double() for value in (process.alpha(T), process.sigma(T)))
    real, fake = (process.join(guess, (x_t - alpha * guess) / sigma, T) for guess in (x0_real, x0_fake))
    step = -gradient_of(objective, x0, x_t, T, real, fake, process)
    along = (step * (x0_real - x0_fake)).flatten(1).sum(1)
    assert (along > 0).all()
    assert_close(along**2, step.flatten(1).square().sum(1) * (x0_real - x0_fake).flatten(1).square().sum(1))  # and nowhere else


def test_the_gradient_carries_no_graph_and_keeps_what_is_not_finite():
    process = process_of("epsilon")
    x0, x_t, real, fake = (tensor.requires_grad_() for tensor in tensors(4))
    for objective in ("vsd", "dmd"):
        assert not gradient_of(objective, x0, x_t, T, real, fake, process).requires_grad
    with torch.no_grad():
        real[0, 0] = float("nan")
    assert vsd_gradient(x_t, T, real, fake, process).isnan().any()  # the loop counts it; it never becomes a number


def test_vsd_loss_hands_g_to_x0():
    x0, g = tensors(2)
    x0.requires_grad_()
    loss = gradient_loss(x0, g)
    (gradient,) = torch.autograd.grad(loss, x0)
    assert_close(gradient, g / g.numel())
    assert_close(loss, 0.5 * g.square().mean())


def test_alpha2_is_its_definition_for_every_prediction_type(process):
    x0, noise, prediction = tensors(3)
    x_t = process.add_noise(x0, noise, T)
    alpha = per_sample(process.alpha(T), x_t).double()
    eps_fake = process.eps(prediction, x_t, T)
    assert_close(denoising_loss(prediction, x0, noise, x_t, T, process, "alpha2"), (alpha * (eps_fake - noise)).square().mean())


@pytest.mark.parametrize(("kind", "power"), [("epsilon", 2), ("v_prediction", 4)])
def test_alpha2_is_the_plain_loss_times_a_power_of_alpha(kind, power):
    """At one timestep; that is what the docstring of `denoise` says of the weightings."""
    process = process_of(kind)
    for timestep in T.tolist():
        t = torch.full((4,), timestep)
        x0, noise, prediction = tensors(3, timestep)
        x_t = process.add_noise(x0, noise, t)
        arguments = (prediction, x0, noise, x_t, t, process)
        alpha = process.alpha(t)[0].double()
        assert_close(denoising_loss(*arguments, "alpha2"), alpha**power * denoising_loss(*arguments, "none"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["alpha2", "none"])
def test_the_denoising_loss_is_zero_at_the_truth_only(process, weighting):
    x0, noise, other = tensors(3)
    x_t = process.add_noise(x0, noise, T)
    truth = process.join(x0, noise, T)
    assert denoising_loss(truth, x0, noise, x_t, T, process, weighting).item() < 1e-12
    assert denoising_loss(other, x0, noise, x_t, T, process, weighting).item() > 1e-3


def test_regression_is_the_mean_square():
    x0, target = tensors(2)
    assert_close(regression_loss(x0, target), ((x0 - target) ** 2).mean())
