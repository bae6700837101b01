"""The optimisers of both roles, their learning rates, and the moving average of the student's adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.distill.config import DistillConfig
from wadi.distill.objectives.base import Objective
from wadi.distill.schedules import average_weight, cosine_to_a_tenth, rise
from wadi.distill.state import TrainState
from wadi.errors import WadiError
from wadi.parallel.ranks import Ranks


def initial_state(
    network: nn.Module,
    config: DistillConfig,
    device: torch.device,
    ranks: Ranks | None = None,
    objective: Objective | None = None,
) -> TrainState:
    """Return the state at step 0: optimisers, scalers, random generator and moving average.

    Args:
        ranks: the processes of the run; None = this one alone.
        objective: of the run, with its modules; None = one without modules.
    Raises:
        WadiError: if the config wants 8-bit moments and bitsandbytes is not installed.
    """
    optimizer_class = _adamw8bit() if config.optimizer == "adamw8bit" else torch.optim.AdamW
    modules = nn.ModuleDict() if objective is None else objective.modules
    ema = {k: v.clone() for k, v in roles.state_dict(network, "student").items()} if config.student.ema else {}
    generator = torch.Generator().manual_seed(config.seed)
    state = TrainState(network, {}, {}, generator, modules, ema, ranks or Ranks())
    for role in ("student", "fake"):
        if groups := state.trainable(role):
            settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
            state.optimizers[role] = optimizer_class(
                [{"params": parameters} for parameters in groups], lr=getattr(config, role).lr, **settings
            )
            state.scalers[role] = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    return state


def _adamw8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise WadiError(
            "optimizer is 'adamw8bit', and bitsandbytes is not installed. Install it (pip install 'wadi-onestep[8bit]'), or "
            "set optimizer to 'adamw'."
        ) from error
    return AdamW8bit


def backward(state: TrainState, role: str, loss: Tensor) -> None:
    """Add the gradient of ``loss`` to the parameters of ``role``; scaled, where the network computes in float16."""
    state.scalers[role].scale(loss).backward()


def update(state: TrainState, role: str, config: DistillConfig) -> Tensor:
    """Make one update of a role: average its gradient over processes, clip it, step, and clear it. Communicates.

    The gradients of the adapter and of the objective's modules are clipped apart. A step with a non-finite gradient is counted
    and left out.

    Returns:
        Norm of the adapter's gradient before clipping.
    Raises:
        WadiError: after ``config.max_skipped`` steps in a row with a non-finite gradient.
    """
    optimizer, scaler = state.optimizers[role], state.scalers[role]
    groups = [group["params"] for group in optimizer.param_groups]
    state.ranks.average([parameter.grad for group in groups for parameter in group if parameter.grad is not None])
    scaler.unscale_(optimizer)
    norm, *others = [nn.utils.clip_grad_norm_(parameters, config.clip) for parameters in groups]
    if norm.isfinite() and all(other.isfinite() for other in others):
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
            f"The {role}'s gradient was not finite {in_a_row} times in a row at step {state.step}. The last checkpoint is "
            "untouched. Try dtype bfloat16 or float32, a lower student.lr or fake.lr, or an earlier student.timesteps."
        )
    return norm


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """Within the block the student's adapter has its moving average as values, if there is one."""
    with torch.no_grad():
        live = roles.state_dict(state.network, "student")
        current = {key: live[key].clone() for key in state.ema}
        for key, average in state.ema.items():
            live[key].copy_(average)
    try:
        yield
    finally:
        for key, value in current.items():
            live[key].copy_(value)


@torch.no_grad()
def update_average(state: TrainState, decay: float) -> None:
    """Move the average towards the student. It follows faster in early steps, so that it forgets the start."""
    if state.ema:
        weight = average_weight(state.step, decay)
        for key, value in roles.state_dict(state.network, "student").items():
            state.ema[key].lerp_(value, weight)


def set_learning_rates(state: TrainState, config: DistillConfig, objective: Objective) -> None:
    """Set all learning rates for the state's step: a linear rise, then constant or a cosine down to a tenth."""
    warmup = rise(state.step + 1, config.lr_warmup + 1)
    fall = cosine_to_a_tenth(state.step, config.steps) if config.lr_schedule == "cosine" else 1.0
    rates = {"student": (config.student.lr,), "fake": (config.fake.lr, objective.module_lr)}
    for role, optimizer in state.optimizers.items():
        for group, rate in zip(optimizer.param_groups, rates[role], strict=False):
            group["lr"] = rate * warmup * fall


@contextmanager
def frozen(state: TrainState, role: str) -> Iterator[None]:
    """Within the block nothing that a role trains gets a gradient. Gradients may still flow through it."""
    parameters = [parameter for group in state.trainable(role) for parameter in group if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
