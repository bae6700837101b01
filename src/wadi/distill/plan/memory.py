"""The memory of one training step, found by running it with tensors that have shapes but no contents.

`wadi.distill.step.train_step` itself runs under torch's fake tensors, and a dispatch mode adds up the storages that are alive.
So everything that the step does is counted: tensors that the student's graph keeps, that checkpointing recomputes, that the
guided passes need at the same time. Not seen are workspaces of kernels, unused memory of the allocator, and the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wadi.backbones import Backbone, Condition
from wadi.backbones.condition import Shape, sizes_and_dtype
from wadi.distill.batch import Batch
from wadi.distill.config import DistillConfig, WarmStartConfig
from wadi.distill.objectives.base import Objective
from wadi.distill.state import TrainState
from wadi.distill.step import train_step
from wadi.errors import first_line


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors: those passed to `show`, and those that appear while it is active.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def show(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` once, for as long as it lives."""
        storage: Any = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.show(leaf)
        return out


def peak_bytes(
    backbone: Backbone, config: DistillConfig, objective: Objective, shapes: Mapping[str, Shape], timestep: int
) -> int:
    """Return the largest number of bytes alive in a step of ``config``: network, adapters, moments, gradients, activations.

    Args:
        backbone: with both roles attached. Its network's parameters are replaced by fake ones for good.
        objective: its modules are built here.
        shapes: of one row of each tensor of a condition.
        timestep: the student's first. The later ones are evaluated without gradient and need less.
    Raises:
        Untraceable: if what the network computes depends on numbers, which tensors without contents do not have.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    ema, objective.modules = bool(config.student.ema), nn.ModuleDict()
    # One update of each kind has the memory of all; more than two micro-batches have that of two.
    config = replace(
        config,
        accumulate=min(config.accumulate, 2),
        fake=replace(config.fake, updates=1),
        warm_start=WarmStartConfig(),
        student=replace(config.student, ema=0.0),
    )
    with _untraceable(), FakeTensorMode(allow_non_fake_inputs=True):  # the schedule's table is a small real tensor
        replace_by_fakes(backbone.network)
        live = LiveBytes()
        for tensor in backbone.network.state_dict().values():
            live.show(tensor)
        with live:
            objective.build(backbone)
            state = _state(backbone.network, objective)
            held = _optimizer_memory(state, averaged=ema)
            batch = _batch(backbone, shapes, config, objective)
            train_step(backbone, batch, (timestep,), objective, config, state, update=_drop_gradient)
            del held
        return live.peak


class Untraceable(Exception):
    """A network cannot be run with tensors that have no contents. The message says at which operation."""


@contextmanager
def _untraceable() -> Iterator[None]:
    """Turn the errors of torch's fake tensors for operations that need numbers into `Untraceable`."""
    from torch._subclasses import fake_tensor
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        yield
    except (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
        GuardOnDataDependentSymNode,
        NotImplementedError,
    ) as error:
        raise Untraceable(first_line(error)) from error


def replace_by_fakes(network: nn.Module) -> None:
    """Replace every parameter and buffer by an empty tensor on the CPU, under the fake mode that is active."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _optimizer_memory(state: TrainState, averaged: bool) -> list[Tensor]:
    """Return tensors as large as AdamW's two moments of everything trained, and the student's average if there is one."""
    copies = [("student", 2), ("fake", 2), ("student", 1 if averaged else 0)]
    return [
        parameter.new_empty(parameter.shape)
        for role, count in copies
        for _ in range(count)
        for group in state.trainable(role)
        for parameter in group
    ]


def _batch(backbone: Backbone, shapes: Mapping[str, Shape], config: DistillConfig, objective: Objective) -> Batch:
    size = config.batch * config.accumulate
    rows = {name: sizes_and_dtype(shape) for name, shape in shapes.items()}
    condition = Condition({name: torch.zeros(size, *sizes, dtype=dtype) for name, (sizes, dtype) in rows.items()})
    z = torch.randn(size, *backbone.latent_shape)
    if objective.needs_samples:
        return Batch(condition, condition[:1], z, z[:0], samples=torch.zeros_like(z), sample_condition=condition)
    return Batch(condition, condition[:1], z, z[:0])


def _state(network: nn.Module, objective: Objective) -> TrainState:
    """Return a state without optimisers: their updates need numbers."""
    scalers = {role: torch.amp.GradScaler("cpu", enabled=False) for role in ("student", "fake")}
    return TrainState(network, {}, scalers, torch.Generator().manual_seed(0), objective.modules)


def _drop_gradient(state: TrainState, role: str, config: DistillConfig) -> Tensor:
    """Stand in for `wadi.distill.optimizers.update`: free the gradient as the update does, without changing a parameter."""
    for group in state.trainable(role):
        for parameter in group:
            parameter.grad = None
    return torch.zeros(())
