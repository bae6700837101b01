"""Train the judge on compositions of the sprites. Half of them pass through the autoencoder first.

The judge of the DiT learns scenes of one or two things; each of two things has the probability 1/2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.distill.schedules import cosine, rise
from wadi.io.progress import progress
from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.judge import Classifier, channels_last
from wadi.zoo.recipe import scenes
from wadi.zoo.recipe.autoencoder import decode, encode
from wadi.zoo.recipe.compose import compose, random_pose
from wadi.zoo.recipe.icons import Sprites
from wadi.zoo.recipe.state import Average, resume_run, save_run, save_tensors
from wadi.zoo.recipe.teacher import kind_of

if TYPE_CHECKING:
    from wadi.zoo.recipe.config import ZooConfig

LR = 2e-3
POOL = 4096  # compositions kept ready, half of them through the autoencoder
FRESH = 8  # compositions added to the pool at every step


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """Write ``model.safetensors`` (fp16) and ``config.json``."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_tensors(folder / "model.safetensors", state)
    config = {"concepts": classifier.concepts, "features": classifier.project.out_features}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def labelled(sprites: Tensor, count: int, generator: torch.Generator, pairs: float | None = None) -> tuple[Tensor, Tensor]:
    """Return ``count`` compositions and their concepts, from ``sprites (concepts, styles, 4, S, S)``.

    Args:
        pairs: share of scenes with two things, for the judge of the DiT; None = compositions of one.
    Returns:
        Images ``(count, 3, 64, 64)`` and labels ``(count, 2)``: the concept and -1, or both concepts.
    """
    if pairs is not None:
        labels = scenes.random_labels(count, generator, pairs)
        return scenes.random_scenes(sprites, labels, generator), labels[:, :2]
    concept = torch.randint(len(CONCEPTS), (count,), generator=generator)
    style = torch.randint(len(STYLES), (count,), generator=generator)
    return compose(sprites[concept, style], random_pose(count, generator)), torch.stack([concept, -torch.ones_like(concept)], 1)


def target_of(labels: Tensor) -> Tensor:
    """Return the distribution ``(B, concepts)`` that the judge learns for labels ``(B, 2)``."""
    present = F.one_hot(labels.clamp_min(0), len(CONCEPTS)) * (labels >= 0)[:, :, None]
    return present.sum(1) / (labels >= 0).sum(1, keepdim=True)


@torch.no_grad()
def through_autoencoder(ae: Any, images: Tensor, generator: torch.Generator, noise: float = 0.5) -> Tensor:
    """Return images after the autoencoder, each with latent noise of its own of at most ``noise``."""
    z = encode(ae, images)
    level = noise * torch.rand(len(z), 1, 1, 1, generator=generator)
    return ((decode(ae, z + level * torch.randn(z.shape, generator=generator)) + 1) / 2).clamp(0, 1)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a random part of the batch, brighten or darken another, and add a little noise to all."""
    chance = torch.rand(len(images), 3, 1, 1, 1, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    x = torch.where(chance[:, 0] < 0.3, blurred, images)
    x = x * (0.85 + 0.3 * chance[:, 1])
    return (x + 0.06 * chance[:, 2] * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def train_classifier(config: ZooConfig, ae: Any, sprites: Sprites, out: Path) -> Classifier:
    """Train for ``config.steps_classifier`` steps, resuming from ``out``."""
    torch.manual_seed(config.seed)
    pairs = share_of_pairs(config)
    art = sprites.pixels[sprites.of_concepts()]
    model = channels_last(Classifier(list(CONCEPTS)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.02)
    average, path = Average(model, 0.995), out / ("classifier.safetensors" if pairs is None else "classifier-dit.safetensors")
    step = (resume_run(path, model, optimiser, average) or {"step": 0})["step"]
    generator = torch.Generator().manual_seed(config.seed + 1 + step)
    last = config.steps_classifier
    if step < last:
        pool, labels = labelled(art, POOL, generator, pairs)
        pool[::2] = torch.cat([through_autoencoder(ae, part, generator) for part in pool[::2].split(64)])
    with progress("classifier", last, step) as bar:
        while step < last:
            for group in optimiser.param_groups:
                group["lr"] = LR * rise(step + 1, 60) * cosine(step, last)
            where = (step * FRESH + torch.arange(FRESH)) % len(pool)
            images, labels[where] = labelled(art, FRESH, generator, pairs)
            images[::2] = through_autoencoder(ae, images[::2], generator)
            pool[where] = images
            index = torch.randint(len(pool), (96,), generator=generator)
            logits = model(degrade(pool[index], generator))
            loss = F.cross_entropy(logits, target_of(labels[index]), label_smoothing=0.05)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
            step += 1
            bar.advance({"loss": loss.item()})
            if step % 200 == 0 or step == last:
                save_run(path, model, optimiser, average, step=step)
    average.copy_to(model)
    return settle(model, art, generator, pairs)


def share_of_pairs(config: ZooConfig) -> float | None:
    """Return the share of images with two things that the judge of ``config.model`` learns from; None = compositions of one."""
    return scenes.PAIRS if kind_of(config.model).shows_pairs else None


@torch.no_grad()
def settle(model: Classifier, art: Tensor, generator: torch.Generator, pairs: float | None = None) -> Classifier:
    """Measure the batch statistics again: those kept during training belong to the weights before averaging."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches below
    model.train()
    for _ in range(24):
        model(degrade(labelled(art, 96, generator, pairs)[0], generator))
    return model.eval().requires_grad_(False)


def accuracy_on_data(classifier: Classifier, ae: Any, sprites: Sprites, count: int = 2048) -> tuple[float, float]:
    """Return the top-1 accuracy on ``count`` compositions that were never used in training.

    The second number is the accuracy on the same images after the autoencoder.
    """
    generator = torch.Generator().manual_seed(987654321)
    images, labels = labelled(sprites.pixels[sprites.of_concepts()], count, generator)
    names = [classifier.concepts[i] for i in labels[:, 0].tolist()]
    decoded = torch.cat([through_autoencoder(ae, part, generator, noise=0.0) for part in images.split(64)])
    return classifier.top1(images, names), classifier.top1(decoded, names)


def pair_accuracy_on_data(classifier: Classifier, ae: Any, sprites: Sprites, count: int = 2048) -> tuple[float, float]:
    """Return how often both things of ``count`` scenes that were never used in training are named: before and after the
    autoencoder.
    """
    generator = torch.Generator().manual_seed(987654321)
    images, labels = labelled(sprites.pixels[sprites.of_concepts()], count, generator, pairs=1.0)
    pairs = [(classifier.concepts[i], classifier.concepts[j]) for i, j in labels.tolist()]
    decoded = torch.cat([through_autoencoder(ae, part, generator, noise=0.0) for part in images.split(64)])
    return classifier.top2(images, pairs), classifier.top2(decoded, pairs)
