"""The two optimisers of a run, their learning rates, and the moving average of the student's angles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.distill.checkpoints import TrainState
from wadi.distill.config import DistillConfig
from wadi.errors import WadiError


def initial_state(network: nn.Module, config: DistillConfig, device: torch.device) -> TrainState:
    """Optimisers, scalers, generator and moving average at step 0."""

    def adamw(role: str, lr: float) -> Any:
        angles = list(roles.parameters(network, role).values())
        return kind(angles, lr=lr, betas=config.betas, weight_decay=config.weight_decay)

    kind = _adamw8bit() if config.optimizer == "adamw8bit" else torch.optim.AdamW

    optimizers = {"student": adamw("student", config.student.lr), "fake": adamw("fake", config.fake.lr)}
    scalers = {role: torch.amp.GradScaler(device.type, enabled=config.dtype == "float16") for role in optimizers}
    ema = {k: v.clone() for k, v in roles.state_dict(network, "student").items()} if config.student.ema else {}
    return TrainState(network, dict(optimizers), scalers, torch.Generator().manual_seed(config.seed), ema)


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise WadiError(
            "optimizer is 'adamw8bit', and bitsandbytes is not installed. Expected it, or 'adamw': "
            "pip install 'wadi-onestep[8bit]'."
        ) from error
    return AdamW8bit


def update(state: TrainState, role: str, config: DistillConfig) -> Tensor:
    """Average over processes, clip, step and clear one role's optimiser; the gradient's norm before clipping.

    A non-finite gradient is counted and its step left out.

    Raises:
        WadiError: after ``config.max_skipped`` steps in a row without a finite gradient.
    """
    optimizer, scaler = state.optimizers[role], state.scalers[role]
    angles = optimizer.param_groups[0]["params"]
    state.ranks.average([angle.grad for angle in angles if angle.grad is not None])
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(angles, config.clip)
    if norm.isfinite():
        scaler.step(optimizer)
        in_a_row = 0
    else:
        state.skipped += 1
        in_a_row = state.skipped_in_a_row.get(role, 0) + 1
    state.skipped_in_a_row[role] = in_a_row
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if in_a_row >= config.max_skipped:
        raise WadiError(
            f"The {role}'s gradient was not finite {in_a_row} times in a row at step {state.step}. "
            "Expected finite numbers: try dtype bfloat16 or float32, a lower student.lr or fake.lr, or an earlier "
            "student.timestep. The last checkpoint is untouched."
        )
    return norm


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """Within the block the student's angles are their moving average, if one is kept."""
    with torch.no_grad():
        live = roles.state_dict(state.network, "student")
        raw = {key: live[key].clone() for key in state.ema}
        for key, average in state.ema.items():
            live[key].copy_(average)
    try:
        yield
    finally:
        for key, value in raw.items():
            live[key].copy_(value)


@torch.no_grad()
def update_average(state: TrainState, decay: float) -> None:
    """Move the average; early on it follows faster, so that it forgets where it began."""
    if state.ema:
        weight = 1 - min(decay, (1 + state.step) / (10 + state.step))
        for key, value in roles.state_dict(state.network, "student").items():
            state.ema[key].lerp_(value, weight)


def set_learning_rates(state: TrainState, config: DistillConfig) -> None:
    """Both learning rates at the state's step: linear rise, then constant or a cosine to a tenth."""
    rise = min(1.0, (state.step + 1) / (config.lr_warmup + 1))
    fall = 1.0
    if config.lr_schedule == "cosine":
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * state.step / config.steps))
    for role, lr in (("student", config.student.lr), ("fake", config.fake.lr)):
        for group in state.optimizers[role].param_groups:
            group["lr"] = lr * rise * fall
