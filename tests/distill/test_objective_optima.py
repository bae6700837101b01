"""Each objective leads to a known optimum: the problems of `exact_scores`."""

import pytest
import torch
from exact_scores import (
    CENTRES,
    COVARIANCE,
    FIRST,
    MEAN,
    SIDE,
    VARIANCE,
    Toy,
    mixture_root,
    mixture_x0,
    off,
    process,
    teacher_of_a_gaussian,
    trained,
)

from wadi.distill.objectives import base, objective_class, vsd

OPTIONS = {"sid": {"alpha": 0.75}}


@pytest.mark.parametrize("name", ["vsd", "dmd", "dmd2", "sid"])
def test_the_optimum_of_a_gaussian_teacher_is_its_distribution(name):
    found = trained(Toy(teacher_of_a_gaussian), name, options=OPTIONS.get(name))
    assert off(found, (MEAN, COVARIANCE)) < 0.03, found


def mixture_optimum():
    """The Gaussian that minimises the sum over ``t`` of ``sigma^3 / alpha`` times the divergence of the noised densities.

    The gradient of ``KL(q_t || p_t)`` at ``x0`` is ``alpha (score_q - score_p)``, and ``sigma^2 (eps_p - eps_q)`` is ``sigma^3
    (score_q - score_p)``. Integrals by Gauss-Hermite quadrature, in float64.
    """
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    points = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes))
    mass = torch.outer(torch.tensor(weights), torch.tensor(weights)).flatten() / (2 * torch.pi)
    noising, times = process(), torch.arange(20, 980, 8)
    alphas, sigmas = noising.alpha(times).double(), noising.sigma(times).double()
    factor = torch.tensor([[0.6, 0.0], [0.0, 0.6]], dtype=torch.float64, requires_grad=True)
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([factor, mean], max_iter=200, line_search_fn="strong_wolfe")

    def divergence():
        solver.zero_grad()
        covariance, total = factor @ factor.T, 0.0
        for alpha, sigma in zip(alphas, sigmas, strict=True):
            noised = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
            x = alpha * mean + points @ torch.linalg.cholesky(noised).T
            spread = alpha**2 * VARIANCE + sigma**2
            squares = (x[:, None] - alpha * CENTRES.double()).square().sum(2)
            log_p = torch.logsumexp(-squares / (2 * spread), 1) - torch.log(spread)
            total = total + sigma**3 / alpha**2 * (-torch.logdet(noised) / 2 - (mass * log_p).sum())
        total.backward()
        return total

    solver.step(divergence)
    return mean.detach().float(), (factor @ factor.T).detach().float()


def test_the_optimum_of_a_mixture_is_that_of_the_weighted_divergence():
    found = trained(Toy(mixture_x0), "vsd")
    assert off(found, mixture_optimum()) < 0.04, (found, mixture_optimum())


def dmd_value(x0, x_t, real, exact_fake):
    """``x0 . (x0_fake - x0_real) / mean |x0 - x0_real|`` with all but the first ``x0`` fixed."""
    fixed = x_t.detach()
    direction = exact_fake(fixed) - real(fixed)
    error = (x0.detach() - real(fixed)).abs().mean(1)
    return (x0 * direction).mean(1) / error


def sid_value(x0, x_t, real, exact_fake, alpha=0.75):
    """``((1 - a) |d|^2 + d . (x0_fake - x0)) / mean |x0 - x0_real|``, written out; the divisor is fixed."""
    d = real(x_t) - exact_fake(x_t)
    value = (1 - alpha) * d.square().mean(1) + (d * (exact_fake(x_t) - x0)).mean(1)
    return value / (x0 - real(x_t)).abs().mean(1).detach()


@pytest.mark.parametrize(("name", "value"), [("dmd", dmd_value), ("dmd2", dmd_value), ("sid", sid_value)])
def test_the_optimum_of_a_mixture_is_where_the_expected_gradient_vanishes(name, value):
    found, expected = trained(Toy(mixture_x0), name, options=OPTIONS.get(name)), mixture_root(value)
    assert off(found, expected) < 0.04, (found, expected)


def test_consistency_ends_at_the_teachers_own_path():
    """The map that DDIM with the same steps makes of noise at the student's timestep, composed by hand."""
    count = 8
    times = [round(i * FIRST / count) for i in range(1, count + 1)]
    toy = Toy(teacher_of_a_gaussian, times)

    def samples(generator):
        return (MEAN + torch.randn(SIDE, 2, generator=generator) @ torch.linalg.cholesky(COVARIANCE).T).reshape(SIDE, 2, 1, 1)

    trained(toy, "consistency", 1200, 0.03, {"solver_steps": count, "huber": 0.05}, samples)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    start, noising = x.clone(), toy.process
    for t, s in zip(times[::-1], [*times[-2::-1], 0], strict=True):
        at, to = torch.full((3,), t), torch.full((3,), s)
        alpha, sigma = noising.alpha(at), noising.sigma(at)
        x0 = teacher_of_a_gaussian(x, alpha, sigma)
        x = (
            x0
            if s == 0
            else noising.alpha(to)[:, None] * x0 + noising.sigma(to)[:, None] * (x - alpha[:, None] * x0) / sigma[:, None]
        )
    found = (toy.A[-1] @ start[:, :, None])[:, :, 0] + toy.b[-1]
    assert float((found - x).detach().abs().max()) < 0.05, (found, x)


# --- the tests above notice a wrong loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vsd", "dmd", "sid"])
def test_a_planted_sign_error_is_found(name, monkeypatch):
    found = objective_class(name)
    plain = found.student_loss
    monkeypatch.setattr(found, "student_loss", lambda self, *rest: base.Loss(-plain(self, *rest).value))
    assert not off(trained(Toy(teacher_of_a_gaussian), name, 200, options=OPTIONS.get(name)), (MEAN, COVARIANCE)) < 0.1


def test_a_missing_weight_is_found(monkeypatch):
    """Without ``sigma^2`` the optimum of the mixture is another one."""

    def unweighted(x_t, t, real, fake, noising):
        return (real - fake).detach() / noising.sigma(t).reshape(-1, 1, 1, 1) ** 2

    monkeypatch.setattr(vsd, "vsd_gradient", unweighted)
    assert not off(trained(Toy(mixture_x0), "vsd"), mixture_optimum()) < 0.04
