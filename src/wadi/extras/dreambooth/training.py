"""DreamBooth: a handful of pictures teach a model one more subject, by LoRaD, LoRA or full weights.

The subject's latents ``x`` ``(N, C, H, W)`` go by a prompt with a rare word in it ("sks apple"). Three losses:

    'diffusion'     E |F(x_t, t, c) - target|^2 at random t, of the network's own prediction F    (Ruiz et al. 2022)
    'one-step'      E |G(z, c) - x_j|^2, G the student's single step, j the picture matched to z

and to either, with a weight, the same on what the model itself drew before for the class ("apple"): prior preservation. For
'one-step' that is its own picture of the same noise, so the prior has no floor of its own: every noise keeps its picture.

Which picture a noise is to become decides what one step learns. Paired at random, the best answer is the mean of all pictures:
a blur. So each batch pairs its noises with its pictures nearest first, and a noise is asked for the picture it is closest to
already. 'diffusion' on a student is what trainers of LoRAs do today to a distilled model; it is here to be measured against.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.backbones.saving import write_pipeline
from wadi.diffusion.schedulers import timestep_of
from wadi.distill.schedules import cosine_to_a_tenth
from wadi.errors import WadiError
from wadi.extras.dreambooth.data import Prior
from wadi.extras.lora import ADAPTER_NAME
from wadi.extras.lora.training import attach_lora, write_lora
from wadi.extras.steps import refuse_noiseless
from wadi.io import bounds
from wadi.io.files import whole_folder
from wadi.io.progress import progress
from wadi.sampling import one_step

Method = Literal["lorad", "lora", "full"]
Loss = Literal["diffusion", "one-step"]


_LIMITS: dict[str, bounds.Whole | bounds.Number] = {
    "rank": bounds.RANK, "steps": bounds.UPDATES, "batch": bounds.BATCH, "lr": bounds.RATE,
    "prior_weight": bounds.Number(0, 1000), "seed": bounds.SEED,
}  # fmt: skip


@dataclass(frozen=True)
class DreamboothConfig:
    """How to train.

    Args:
        method: what is trained.
        rank: of the adapter.
        target_modules: regular expression, full match over names of layers; None = those of the family's students.
        lr: learning rate, falling along a cosine to a tenth.
        steps: updates.
        batch: pictures of the subject per update, and as many of the class.
        prior_weight: of the class's loss, if there is a prior.
        loss: see the module.
        seed: of everything that is drawn.
    Raises:
        WadiError: if a value is out of range.
    """

    method: Method = "lorad"
    rank: int = 16
    target_modules: str | None = None
    lr: float = 1e-3
    steps: int = 200
    batch: int = 4
    prior_weight: float = 1.0
    loss: Loss = "diffusion"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("method", get_args(Method)), ("loss", get_args(Loss))):
            if getattr(self, name) not in choices:
                raise WadiError(f"{name} is {getattr(self, name)!r}. Expected one of {', '.join(choices)}.")
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))


@dataclass(frozen=True)
class Trained:
    """What training did: numbers trained, loss on the subject by step, seconds."""

    parameters: int
    losses: list[float]
    seconds: float


def check(backbone: Backbone, config: DreamboothConfig) -> None:
    """Raise `WadiError` if a diffusion loss is to be taken by a schedule that adds no noise: that of a single step alone."""
    if config.loss == "diffusion" and backbone.process.alphas is not None:
        refuse_noiseless(backbone.pipeline.scheduler, range(1, backbone.process.num_timesteps))


def train(
    backbone: Backbone,
    subject: Tensor,
    condition: Condition,
    prior: Prior | None,
    config: DreamboothConfig,
    quiet: bool = False,
) -> Trained:
    """Train the backbone's network in place: the adapter stays attached as `wadi.extras.lora.ADAPTER_NAME`.

    The same arguments give the same weights, to the bit on a CPU.

    Args:
        subject: latents ``(N, C, H, W)``.
        condition: of the subject's prompt, one row.
    Raises:
        WadiError: if the network carries an adapter, no layer matches, or the loss is not finite.
    """
    check(backbone, config)
    network = backbone.network
    parameters = _trainable(backbone, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    generator, losses, start = torch.Generator().manual_seed(config.seed), list[float](), time.perf_counter()
    network.eval()
    subject = subject.to(backbone.device)
    with progress("dreambooth", config.steps, quiet=quiet) as bar:
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * cosine_to_a_tenth(step, config.steps)
            loss, of_subject = _loss(backbone, subject, condition, prior, config, generator)
            loss.backward()
            _refuse_blown_up(nn.utils.clip_grad_norm_(parameters, 1.0), step, config)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(of_subject))
            bar.advance({"loss": losses[-1]})
    return Trained(sum(p.numel() for p in parameters), losses, time.perf_counter() - start)


def _refuse_blown_up(norm: Tensor, step: int, config: DreamboothConfig) -> None:
    if not torch.isfinite(norm):
        raise WadiError(
            f"The gradient at step {step} is not finite. Expected a smaller --lr than {config.lr:g}: nothing was saved."
        )


def _trainable(backbone: Backbone, config: DreamboothConfig) -> list[nn.Parameter]:
    """What ``config.method`` trains, attached and ready; the initial values follow from the seed alone."""
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


# --- losses -----------------------------------------------------------------------------------------------------------------


def _loss(
    backbone: Backbone,
    subject: Tensor,
    condition: Condition,
    prior: Prior | None,
    config: DreamboothConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The loss of one step, and the subject's part of it, detached. Subject and class go through the network as one batch."""
    rows = _draw(len(subject), config.batch, generator)
    x0, conditions = subject[rows], condition.expand(config.batch)
    z = torch.randn(x0.shape, generator=generator).to(x0.device)
    if prior is not None:
        chosen = torch.randint(len(prior.x0), (config.batch,), generator=generator)
        fresh = torch.randn(x0.shape, generator=generator).to(x0.device)
        x0 = torch.cat([x0, prior.x0[chosen]])
        z = torch.cat([z, prior.z[chosen] if config.loss == "one-step" else fresh])
        conditions = Condition.cat([conditions, prior.condition[chosen]])
    per_picture = (_one_step_loss if config.loss == "one-step" else _diffusion_loss)(
        backbone, x0, z, conditions, config.batch, generator
    )
    of_subject = per_picture[: config.batch].mean()
    loss = of_subject
    if prior is not None:
        loss = loss + config.prior_weight * per_picture[config.batch :].mean()
    return loss, of_subject.detach()


def _draw(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """``batch`` row numbers below ``count``: each as often as any other where that divides, else by chance."""
    whole = [torch.randperm(count, generator=generator) for _ in range(-(-batch // count))]
    return torch.cat(whole)[:batch]


def _diffusion_loss(
    backbone: Backbone, x0: Tensor, noise: Tensor, condition: Condition, _batch: int, generator: torch.Generator
) -> Tensor:
    """``|F(x_t, t, c) - target|^2`` ``(B,)`` at uniform ``t`` of the pipeline's own schedule."""
    process = backbone.process
    t = torch.randint(process.last_timestep + 1, (len(x0),), generator=generator).to(x0.device)
    predicted = backbone.predict(process.add_noise(x0, noise, t), t, condition)
    return (predicted - process.join(x0, noise, t)).square().flatten(1).mean(1)


def _one_step_loss(
    backbone: Backbone, x0: Tensor, z: Tensor, condition: Condition, batch: int, _generator: torch.Generator
) -> Tensor:
    """``|G(z, c) - x0|^2`` ``(B,)``; of the first ``batch`` rows each goes with the picture that `match` gives it."""
    made = one_step(backbone, condition, z, timestep_of(backbone.pipeline.scheduler))
    wanted = torch.cat([x0[:batch][match(made[:batch].detach(), x0[:batch])], x0[batch:]])
    return (made - wanted).square().flatten(1).mean(1)


def match(made: Tensor, wanted: Tensor) -> Tensor:
    """Index ``(B,)`` into ``wanted`` for each row of ``made``, each used once: the nearest pair first, then of those left."""
    distances = torch.cdist(made.flatten(1), wanted.flatten(1))
    found = torch.empty(len(made), dtype=torch.long, device=made.device)
    for _ in range(len(made)):
        row, column = divmod(int(distances.argmin()), distances.shape[1])
        found[row] = column
        distances[row], distances[:, column] = math.inf, math.inf
    return found


# --- files ------------------------------------------------------------------------------------------------------------------


def save(pipeline: Any, backbone: Backbone, config: DreamboothConfig, folder: Path, about: dict[str, Any]) -> None:
    """Write what was trained to a new ``folder``, whole or not at all, in its standard format; ``about`` as ``wadi.json``.

    LoRaD: a PEFT adapter folder. LoRA: ``pytorch_lora_weights.safetensors`` (``load_lora_weights`` reads it). Full: a pipeline.

    Raises:
        WadiError: if the family has no such format, or the place cannot be written.
    """
    writers: dict[str, Callable[[Path], Any]] = {
        "lorad": lambda place: roles.write(backbone.network, ADAPTER_NAME, place),
        "lora": lambda place: write_lora(pipeline, place),
        "full": lambda place: write_pipeline(pipeline, place),
    }
    with whole_folder(folder) as place:
        writers[config.method](place)
        (place / "wadi.json").write_text(json.dumps(about, indent=2) + "\n")
