"""DreamBooth: a few images teach a model a new subject, by LoRaD, LoRA or full weights.

The subject's latents ``x`` ``(N, C, H, W)`` belong to a prompt with a rare word in it ("sks apple"). The loss on them is one of
the two in `losses.py`. Prior preservation adds the same loss on latents that the model generated for the class ("apple") before
training. For 'one-step' each of them keeps its noise, so this loss is 0 at the start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.distill.schedules import cosine_to_a_tenth
from wadi.errors import WadiError
from wadi.extras.dreambooth.config import DreamboothConfig
from wadi.extras.dreambooth.losses import dreambooth_loss
from wadi.extras.dreambooth.prior import Prior
from wadi.extras.lora import ADAPTER_NAME
from wadi.extras.lora.training import attach_lora
from wadi.extras.steps import check_noise
from wadi.io.progress import progress


@dataclass(frozen=True)
class DreamboothResult:
    """Statistics of a training: the number of trained parameters, the loss on the subject at each step, the time in seconds."""

    parameters: int
    losses: list[float]
    seconds: float


def check_schedule(backbone: Backbone, config: DreamboothConfig) -> None:
    """Raise `WadiError` if the diffusion loss is chosen for a schedule without noise, such as that of a single step."""
    if config.loss == "diffusion" and backbone.process.alphas is not None:
        check_noise(backbone.pipeline.scheduler, range(1, backbone.process.num_timesteps))


def train_subject(
    backbone: Backbone,
    subject: Tensor,
    condition: Condition,
    prior: Prior | None,
    config: DreamboothConfig,
    quiet: bool = False,
) -> DreamboothResult:
    """Train the backbone's network in place. An adapter stays attached, under the name `wadi.extras.lora.ADAPTER_NAME`.

    The same arguments give the same weights, bit for bit on a CPU.

    Args:
        subject: latents ``(N, C, H, W)`` of the subject's images.
        condition: one row, of the subject's prompt.
    Raises:
        WadiError: if the network carries an adapter already, no layer matches, or the gradient is not finite.
    """
    check_schedule(backbone, config)
    network = backbone.network
    parameters = _trainable_parameters(backbone, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    generator, losses, start = torch.Generator().manual_seed(config.seed), list[float](), time.perf_counter()
    network.eval()
    subject = subject.to(backbone.device)
    with progress("dreambooth", config.steps, quiet=quiet) as bar:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * cosine_to_a_tenth(step, config.steps)
            loss, subject_loss = dreambooth_loss(backbone, subject, condition, prior, config, generator)
            loss.backward()
            _check_gradient(nn.utils.clip_grad_norm_(parameters, 1.0), step, config)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(subject_loss))
            bar.advance({"loss": losses[-1]})
    return DreamboothResult(sum(p.numel() for p in parameters), losses, time.perf_counter() - start)


def _check_gradient(norm: Tensor, step: int, config: DreamboothConfig) -> None:
    if not torch.isfinite(norm):
        raise WadiError(
            f"The gradient at step {step} is not finite, and nothing was saved. Use a smaller --lr than {config.lr:g}."
        )


def _trainable_parameters(backbone: Backbone, config: DreamboothConfig) -> list[nn.Parameter]:
    """Return the parameters that ``config.method`` trains. Their initial values depend on the seed only."""
    network = backbone.network
    roles.refuse_adapted(network)
    targets = config.target_modules or backbone.student_targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.method == "lora":
            return attach_lora(network, config.rank, targets)
        if config.method == "lorad":
            from wadi.lorad import LoRaDConfig

            roles.attach(network, ADAPTER_NAME, LoRaDConfig(r=config.rank, target_modules=targets))
            return list(roles.parameters(network, ADAPTER_NAME).values())
    network.requires_grad_(True)
    return list(network.parameters())
