"""The noising process of a diffusion model and its prediction types, in float32.

A noised sample is ``x_t = alpha_t x0 + sigma_t eps`` with data ``x0`` and noise ``eps ~ N(0, I)``. A network predicts one of

    epsilon     eps
    v           alpha_t eps - sigma_t x0            (Salimans & Ho 2022)
    sample      x0
    velocity    eps - x0                            (rectified flow: d x_t / d sigma)

Each of them, together with ``x_t``, determines the others. Variance-preserving schedules read ``alpha_t`` from the table that
came with the model. Rectified flow has ``alpha = 1 - sigma`` and ``sigma = t / T``. Timesteps ``t`` have shape ``(B,)`` and are
in ``[0, T)``, or in ``[0, T]`` for rectified flow. Samples have shape ``(B, ...)``.

Everything here is float32 (float64 for float64 inputs), for networks of any dtype. Rounding ``alpha_t^2`` to bfloat16
would change ``sigma_t^2`` by up to a quarter at early timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wadi.errors import WadiError

Prediction = Literal["epsilon", "v_prediction", "sample", "velocity"]
MIN_ALPHA = 1e-3  # below it, an error of an epsilon-prediction grows more than a thousandfold


def is_flow_config(class_name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler is one of a rectified flow, from its class name and its config."""
    return "FlowMatch" in class_name or config.get("prediction_type") == "flow_prediction"


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, ..., 1)``, which broadcasts over samples ``like`` of shape ``(B, ...)``."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True, eq=False)
class Process:
    """The noising process: ``alpha(t)``, ``sigma(t)`` and the conversions between prediction types.

    Args:
        prediction: the prediction type of the network.
        num_timesteps: ``T``, the number of training timesteps.
        alphas: table of ``alpha_t``, shape ``(T,)``, float32, for a variance-preserving schedule; None for rectified flow.
    """

    prediction: Prediction
    num_timesteps: int
    alphas: Tensor | None = None

    def __post_init__(self) -> None:
        if self.alphas is not None:
            _ = self._sigmas  # computed now, from real numbers: `wadi plan` would make it a tensor without contents

    @classmethod
    def from_scheduler(cls, scheduler: object) -> Process:
        """Return the process of the diffusers scheduler that came with a model.

        Raises:
            WadiError: if the scheduler is neither variance preserving nor flow matching, or its prediction type is unknown.
        """
        config = scheduler.config  # type: ignore[attr-defined]
        steps = int(config.num_train_timesteps)
        if is_flow_config(type(scheduler).__name__, config):
            return cls("velocity", steps)
        cumprod = getattr(scheduler, "alphas_cumprod", None)
        if cumprod is None:
            raise WadiError(
                f"The teacher's scheduler is {type(scheduler).__name__}, which has neither alphas_cumprod nor flow sigmas. "
                "Save the pipeline with a variance-preserving scheduler (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...) or a "
                "FlowMatch one."
            )
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in get_args(Prediction):
            raise WadiError(
                f"The teacher's scheduler has prediction_type={prediction!r}, which is not one of {get_args(Prediction)}. Set "
                "the type that the network was trained with in scheduler/scheduler_config.json."
            )
        return cls(prediction, steps, torch.as_tensor(cumprod).double().sqrt().float())

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep of the schedule: ``T - 1``, or ``T`` for rectified flow, where ``sigma`` is 1."""
        return self.num_timesteps - 1 if self.alphas is not None else self.num_timesteps

    @property
    def last_determined(self) -> int:
        """The noisiest timestep at which the network's prediction determines an image.

        It is `last_timestep`, except for a network that predicts noise under a schedule whose end has no signal (zero terminal
        SNR).
        """
        if self.alphas is None or self.prediction != "epsilon":
            return self.last_timestep
        return int((self.alphas >= MIN_ALPHA).nonzero().max())

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.alphas is None:
            sigma = t.float() / self.num_timesteps
            return 1 - sigma, sigma
        return self.alphas.to(t.device)[t.long()], self._sigmas.to(t.device)[t.long()]

    @cached_property
    def _sigmas(self) -> Tensor:
        """Table of ``sigma_t``, ``(T,)`` float32, of a variance-preserving schedule.

        ``1 - alpha^2`` loses digits near ``t = 0``, so it is computed in float64, on the CPU: Apple's GPUs have no float64.
        """
        assert self.alphas is not None
        return (1 - self.alphas.cpu().double() ** 2).sqrt().float()

    def alpha(self, t: Tensor) -> Tensor:
        """Return ``alpha_t``, shape ``(B,)``, float32."""
        return self._alpha_sigma(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """Return ``sigma_t``, shape ``(B,)``, float32."""
        return self._alpha_sigma(t)[1]

    def _broadcast(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        alpha, sigma = self._alpha_sigma(t)
        return per_sample(alpha, like).to(dtype), per_sample(sigma, like).to(dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``x_t = alpha_t x0 + sigma_t noise``, shape ``(B, ...)``."""
        alpha, sigma = self._broadcast(t, x0)
        return alpha * x0 + sigma * noise

    def split(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(x0, eps)``, each ``(B, ...)``, of a prediction of type ``kind`` (default: the network's own).

        Solves ``x_t = alpha x0 + sigma eps`` and the definition of the prediction for the two unknowns.
        """
        alpha, sigma = self._broadcast(t, x_t)
        kind = kind or self.prediction
        if kind == "epsilon":
            return (x_t - sigma * prediction) / alpha, prediction.to(alpha.dtype)
        if kind == "sample":
            return prediction.to(alpha.dtype), (x_t - alpha * prediction) / sigma
        if kind == "v_prediction":
            norm = alpha**2 + sigma**2
            return (alpha * x_t - sigma * prediction) / norm, (sigma * x_t + alpha * prediction) / norm
        total = alpha + sigma
        return (x_t - sigma * prediction) / total, (x_t + alpha * prediction) / total

    def join(self, x0: Tensor, eps: Tensor, t: Tensor, kind: Prediction | None = None) -> Tensor:
        """Return the prediction of type ``kind`` (default: the network's own) for ``x0`` and ``eps``. Inverse of `split`."""
        alpha, sigma = self._broadcast(t, x0)
        x0, eps = x0.to(alpha.dtype), eps.to(alpha.dtype)
        kind = kind or self.prediction
        if kind == "epsilon":
            return eps
        if kind == "sample":
            return x0
        if kind == "v_prediction":
            return alpha * eps - sigma * x0
        return eps - x0

    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ``x0``, ``(B, ...)``, of the network's own prediction; for epsilon it is ``(x_t - sigma eps) / alpha``."""
        return self.split(prediction, x_t, t)[0]

    def eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise, ``(B, ...)``, of the network's own prediction."""
        return self.split(prediction, x_t, t)[1]
