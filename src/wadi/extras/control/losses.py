"""The losses that train a ControlNet: for a frozen multi-step teacher, or for a frozen one-step student.

Teacher: ``x_t = alpha_t x0 + sigma_t eps``, with ``x0`` an image of the teacher and ``c`` its edges. The loss is the network's
own denoising loss; only the ControlNet is trained. Noisy timesteps, where the layout is decided, come more often:
``t = (1 - u^3) T`` with ``u`` uniform (Mou et al. 2023).

Student: it takes its one step from ``t*``, and the loss compares the image that results:

    x0_hat = student(alpha x0 + sigma eps, t*, c)
    loss   = picture_weight mean (x0_hat - x0)^2  +  edge_weight mean |s(decode x0_hat) - s(decode x0)|
             + keep_weight mean (r - r_0)^2

``s`` is a soft edge map (`edges.soft_edges`). The input is the image noised to ``t*`` instead of pure noise: the little of the
image that remains determines the colours. Edges and prompt leave the colours open, and a squared error would average them to
grey. ``r - r_0`` (weight 0 by default) is the change of the ControlNet's residuals since the start of the training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wadi.backbones import Backbone, Condition
from wadi.distill.objectives.denoise import denoising_loss
from wadi.extras.control.edges import soft_edges
from wadi.extras.control.network import controlled
from wadi.sampling import one_step


def noisy_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` timesteps ``(1 - u^3) total``, most of them late (noisy)."""
    u = torch.rand(count, generator=generator)
    return ((1 - u**3) * total).long().clamp(max=total - 1)


def teacher_loss(
    backbone: Backbone, controlnet: nn.Module, x0: Tensor, image: Tensor, condition: Condition, noise: Tensor, t: Tensor
) -> Tensor:
    """Return the denoising loss under the ControlNet, for ``x0 (B, C, h, w)``, ``image (B, 3, H, W)`` and ``t (B,)``."""
    x_t = backbone.process.add_noise(x0, noise, t)
    with controlled(backbone.network, controlnet, image):
        predicted = backbone.predict(x_t, t, condition)
    return denoising_loss(predicted, x0, noise, x_t, t, backbone.process, "none")


def student_x0(
    backbone: Backbone, controlnet: nn.Module, x_t: Tensor, image: Tensor, condition: Condition, timestep: int
) -> Tensor:
    """Return the student's one-step ``x0`` under the ControlNet, ``(B, C, h, w)``."""
    with controlled(backbone.network, controlnet, image):
        return one_step(backbone, condition, x_t, timestep)


def edge_loss(backbone: Backbone, x0: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference between the soft edge maps of two batches of latents, after decoding."""
    with torch.no_grad():
        target_edges = soft_edges(backbone.decode(target))
    return (soft_edges(backbone.decode_with_gradient(x0)) - target_edges).abs().mean()


def residual_change(
    controlnet: nn.Module, initial: nn.Module, x_t: Tensor, t: Tensor, image: Tensor, condition: Condition
) -> Tensor:
    """Return the mean squared difference between the residuals of a ControlNet and of the ``initial`` one."""
    tensors = condition.tensors
    added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]} if "pooled" in tensors else None
    inputs: dict[str, Any] = {
        "encoder_hidden_states": tensors["prompt_embeds"],
        "controlnet_cond": image,
        "added_cond_kwargs": added,
    }
    now, then = (net(x_t, t, return_dict=False, **inputs) for net in (controlnet, initial))
    pairs = zip([*now[0], now[1]], [*then[0], then[1]], strict=True)
    return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
