"""The memory of one distillation step, found by going through it with tensors that have shapes and no contents.

The step's own code runs under torch's fake tensors; a dispatch mode adds up the storages that are alive. What the student's
graph keeps, what checkpointing recomputes, what a guided pass of the teacher needs beside it: all of it is counted, and
nothing of it is modelled. Kernels' own workspaces, the allocator's slack and the CUDA context are not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.distill.config import DistillConfig
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.objectives.vsd import vsd_gradient, vsd_loss
from wadi.sampling import one_step, predict_guided


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive among those it was shown or that appeared while it was active.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def show(self, tensor: Tensor) -> None:
        """Count ``tensor``'s storage, once, for as long as it lives."""
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


def peak_bytes(backbone: Backbone, config: DistillConfig, shapes: dict[str, tuple[int, ...]], timestep: int) -> int:
    """Largest number of bytes alive in a step of ``config``: weights of the network, angles, moments, gradients, activations.

    Args:
        backbone: with both roles attached; its network's parameters become fake ones, without contents, for good.
        shapes: of one row of each tensor of a condition.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # The schedule's table is a real tensor, and small.
    with FakeTensorMode(allow_non_fake_inputs=True):
        _empty(backbone.network)
        live = LiveBytes()
        for tensor in backbone.network.state_dict().values():
            live.show(tensor)
        with live:
            owners = ("student", "fake") if not config.student.ema else ("student", "fake", "student")  # the last: its average
            held = [p.new_empty(p.shape) for role in owners for p in roles.parameters(backbone.network, role).values()]
            held += [p.new_empty(p.shape) for role in owners[:2] for p in roles.parameters(backbone.network, role).values()]
            if config.accumulate > 1:  # those of the batches before
                for parameter in roles.parameters(backbone.network, "student").values():
                    parameter.grad = torch.empty_like(parameter)
            condition = _condition(shapes, config.batch)
            _step(backbone, config, condition, timestep)
            del held
        return live.peak


def _empty(network: nn.Module) -> None:
    """Put an empty tensor in place of every parameter and buffer, on the CPU under the fake mode that is active."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _condition(shapes: dict[str, tuple[int, ...]], batch: int) -> Condition:
    return Condition({name: torch.zeros(batch, *shape) for name, shape in shapes.items()})


def _step(backbone: Backbone, config: DistillConfig, condition: Condition, timestep: int) -> None:
    """What `wadi.distill.loop.train_step` does, without statistics and optimisers, which need contents.

    Left out is what needs less than another part of the step: the teacher's pass where the fake model's has as many rows, and
    the fake model's update where its layers are among the student's.
    """
    network, process = backbone.network, backbone.process
    z = torch.randn(config.batch, *backbone.latent_shape)
    t = torch.full((config.batch,), timestep)
    with roles.active(network, "student"):
        x0 = one_step(backbone, condition, z, timestep)
        with torch.no_grad():
            null = condition[:1]
            x_t = process.add_noise(x0.detach(), torch.randn(x0.shape), t)
            with roles.active(network, "fake"):
                fake = predict_guided(backbone, x_t, t, condition, null, config.fake.guidance_scale)
            real = torch.empty_like(fake)
            if config.fake.guidance_scale == 1 != config.guidance_scale:
                with roles.active(network, None):
                    real = predict_guided(backbone, x_t, t, condition, null, config.guidance_scale)
            gradient = vsd_gradient(x0, x_t, t, real, fake, process, config.student.weighting)
        loss = vsd_loss(x0, gradient)
        del x_t, real, fake, gradient
        loss.backward()
    x0 = x0.detach()
    _forget_gradients(network)
    sizes = [{name: p.numel() for name, p in roles.parameters(network, role).items()} for role in ("student", "fake")]
    if all(size <= sizes[0].get(name, 0) for name, size in sizes[1].items()):
        return
    with roles.active(network, "fake"):
        eps = torch.randn(x0.shape)
        x_t = process.add_noise(x0, eps, t)
        predicted = backbone.predict(x_t, t, condition)
        denoising_loss(predicted, x0, eps, x_t, t, process, config.fake.weighting).backward()
    _forget_gradients(network)


def _forget_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = None
