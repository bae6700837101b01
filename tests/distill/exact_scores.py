"""Problems in two dimensions with a known optimum: teacher with an exact score, student an affine map of noise.

The student's images ``A z + b`` are Gaussian, so the exact fake model is known in closed form too. Networks predict the noise.
"""

import torch
from diffusers import DDIMScheduler
from scipy import optimize

import tiny
from wadi.backbones import Condition
from wadi.diffusion.process import Process
from wadi.distill.objectives import make_objective
from wadi.distill.objectives.base import Rows
from wadi.distill.random_draws import Random

FIRST = 700  # the student's timestep
MEAN, COVARIANCE = torch.tensor([0.7, -0.4]), torch.tensor([[0.5, 0.3], [0.3, 0.8]])
CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.4]])  # of a mixture with equal weights and this variance:
VARIANCE = 0.2
SIDE = 2048  # images per step


def process():
    return Process.from_scheduler(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def gaussian_x0(x_t, alpha, sigma, mean, covariance):
    """The posterior mean of ``x0`` under ``N(mean, covariance)``."""
    eye = torch.eye(2, dtype=x_t.dtype)
    noised = alpha[:, None, None] ** 2 * covariance + sigma[:, None, None] ** 2 * eye
    gain = alpha[:, None, None] * covariance @ torch.linalg.inv(noised)
    return mean + (gain @ (x_t - alpha[:, None] * mean)[:, :, None])[:, :, 0]


def mixture_x0(x_t, alpha, sigma):
    """The posterior mean of ``x0`` under the mixture."""
    spread = alpha**2 * VARIANCE + sigma**2
    centres = CENTRES.to(x_t.dtype)
    offsets = x_t[:, None] - alpha[:, None, None] * centres
    weights = (-offsets.square().sum(2) / (2 * spread[:, None])).softmax(1)
    each = centres + (alpha * VARIANCE / spread)[:, None, None] * offsets
    return (weights[:, :, None] * each).sum(1)


class Toy:
    """The three roles on ``(B, 2, 1, 1)``: the teacher of a distribution, and a student whose fake model is always exact.

    Args:
        teacher_x0: posterior mean of the teacher, a function of ``(x_t, alpha, sigma)``.
        times: timesteps at which the student has a map; one for objectives that only use its images.
    """

    def __init__(self, teacher_x0, times=(FIRST,)):
        torch.manual_seed(0)
        self.process, self.teacher_x0, self.times = process(), teacher_x0, list(times)
        self.A = torch.nn.Parameter(torch.eye(2).repeat(len(times), 1, 1) * 0.6)
        self.b = torch.nn.Parameter(torch.zeros(len(times), 2))

    def _noise(self, x0_of, x_t, t):
        x, alpha, sigma = x_t.flatten(1), self.process.alpha(t), self.process.sigma(t)
        eps = (x - alpha[:, None] * x0_of(x, alpha, sigma)) / sigma[:, None]
        return eps.reshape(x_t.shape)

    def teacher(self, x_t, t, condition, guidance_scale=1.0):
        return self._noise(self.teacher_x0, x_t, t)

    def fake(self, x_t, t, condition, guidance_scale=1.0):
        A, b = self.A[-1].detach(), self.b[-1].detach()
        return self._noise(lambda x, alpha, sigma: gaussian_x0(x, alpha, sigma, b, A @ A.T), x_t, t)

    def student(self, x_t, t, condition):
        index = torch.tensor([self.times.index(int(time)) if int(time) in self.times else 0 for time in t.tolist()])
        return ((self.A[index] @ x_t.flatten(1)[:, :, None])[:, :, 0] + self.b[index]).reshape(x_t.shape)

    def images(self, z):
        return ((self.A[-1] @ z.flatten(1)[:, :, None])[:, :, 0] + self.b[-1]).reshape(z.shape)


def trained(toy, name, steps=700, lr=0.02, options=None, samples=None):
    """Return mean and covariance of the student after ``steps`` updates by objective ``name``."""
    config = tiny.settings(
        "t", "p", "o", objective=name, objective_options=options or {}, guidance_scale=1.0, student={"timesteps": [FIRST]}
    )
    objective = make_objective(config)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([toy.A, toy.b], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 100)
    condition = Condition({"nothing": torch.zeros(SIDE, 1)})
    for _ in range(steps):
        z = torch.randn(SIDE, 2, 1, 1, generator=generator)
        draws = objective.draw_student(z, toy.process, Random(generator))
        y = z[:0] if samples is None else samples(generator)
        loss = objective.student_loss(toy, Rows(toy.images(z), condition, y, condition, draws)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    A, b = toy.A[-1].detach(), toy.b[-1].detach()
    return b, A @ A.T


def teacher_of_a_gaussian(x_t, alpha, sigma):
    return gaussian_x0(x_t, alpha, sigma, MEAN, COVARIANCE)


def off(found, expected):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def mixture_root(student_loss):
    """The Gaussian at which the expected gradient of the student's ``A`` and ``b`` vanishes: ``(mean, covariance)``.

    Args:
        student_loss: function of ``(x0, x_t, real, fake)`` that returns the loss of each row, ``(B,)``; ``real`` and
            ``fake`` are functions of ``x_t``, and the fake model is exact for the student and held fixed.

    Expectations are means over a low-discrepancy set of ``(z, eps, t)``.
    """
    points = torch.quasirandom.SobolEngine(5, scramble=True, seed=0).draw(2**16, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    z, eps = torch.special.ndtri(points[:, :2]), torch.special.ndtri(points[:, 2:4])
    t = (20 + points[:, 4] * 960).long()
    alpha, sigma = process().alpha(t).double(), process().sigma(t).double()

    def residual(parameters):
        A = torch.tensor(
            [[parameters[0], parameters[1]], [parameters[1], parameters[2]]], dtype=torch.float64, requires_grad=True
        )
        b = torch.tensor(parameters[3:], dtype=torch.float64, requires_grad=True)
        mean, covariance = b.detach(), (A @ A.T).detach()
        x0 = z @ A.T + b
        x_t = alpha[:, None] * x0 + sigma[:, None] * eps
        values = student_loss(
            x0, x_t, lambda x: mixture_x0(x, alpha, sigma), lambda x: gaussian_x0(x, alpha, sigma, mean, covariance)
        )
        dA, db = torch.autograd.grad(values.mean(), (A, b))
        return [float(dA[0, 0]), float(dA[0, 1] + dA[1, 0]), float(dA[1, 1]), *db.tolist()]

    found = optimize.least_squares(residual, [0.9, 0.1, 0.6, 0.1, 0.2], diff_step=1e-3, bounds=(-2, 2))
    assert abs(found.fun).max() < 1e-4, found
    A = torch.tensor([[found.x[0], found.x[1]], [found.x[1], found.x[2]]])
    return torch.tensor(found.x[3:]).float(), (A @ A.T).float()
