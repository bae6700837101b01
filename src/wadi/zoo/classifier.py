"""The judge: a small convolutional network that names the concept of a picture, trained on the data alone.

It sees compositions, half of them through the autoencoder with noise added to the latent, and both blurred and noised
at random, hence it stays reliable on generated pictures; it never sees a picture of the teacher. Its ``FEATURES``
penultimate activations are the space of the Frechet distance.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.io.records import Record, Side, read_json
from wadi.progress import progress
from wadi.zoo.autoencoder import decode, encode
from wadi.zoo.compose import compose, random_pose
from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.icons import Sprites
from wadi.zoo.state import Average, load_tensors, resume_run, save_run, save_tensors

if TYPE_CHECKING:
    from wadi.zoo.recipe import ZooConfig

FEATURES = 96
WIDTHS = (24, 48, 80, 112)
LR = 2e-3
POOL = 4096  # compositions kept ready, half of them through the autoencoder
FRESH = 8  # compositions added to the pool at every step


def _block(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """Pictures ``(B, 3, 64, 64)`` in [0, 1] to ``concepts``; use it in ``eval()`` (``load_classifier`` does)."""

    def __init__(self, concepts: list[str], features: int = FEATURES) -> None:
        super().__init__()
        self.concepts = concepts
        blocks, width = [_block(3, WIDTHS[0], 2)], WIDTHS[0]
        for wider in WIDTHS[1:]:
            blocks += [_block(width, wider, 2), _block(wider, wider, 1)]
            width = wider
        self.body = nn.Sequential(*blocks)
        self.project = nn.Linear(2 * width, features)
        self.head = nn.Linear(features, len(concepts))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations ``(B, FEATURES)``."""
        h = self.body((2 * images - 1).contiguous(memory_format=torch.channels_last))
        return F.silu(self.project(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)))

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalised log-probabilities ``(B, len(concepts))``."""
        return self.head(self.features(images))

    forward = logits

    @torch.no_grad()
    def top1(self, images: Tensor, concepts: list[str], batch: int = 128) -> float:
        """Share of pictures whose most probable concept is the one given for each."""
        best = torch.cat([self.logits(part).argmax(1) for part in images.split(batch)]).tolist()
        return sum(self.concepts[i] == name for i, name in zip(best, concepts, strict=True)) / len(concepts)


def _channels_last(classifier: Any) -> Any:
    return classifier.to(memory_format=torch.channels_last)  # untyped: torch's stubs do not know the argument


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """``model.safetensors`` (fp16) and ``config.json``."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_tensors(folder / "model.safetensors", state)
    config = {"concepts": classifier.concepts, "features": classifier.project.out_features}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


class Config(Record):
    """``config.json`` of a classifier."""

    concepts: list[str]
    features: Side


def read_classifier(folder: Path) -> Classifier:
    """What ``save_classifier`` wrote, in float32 and ready to judge."""
    config: Config = read_json(folder / "config.json", Config, "Classifier config")
    classifier = Classifier(config.concepts, config.features)
    classifier.load_state_dict(load_tensors(folder / "model.safetensors")[0])
    return _channels_last(classifier.eval().requires_grad_(False))


def labelled(sprites: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` compositions and their concepts; ``sprites (concepts, styles, 4, S, S)``."""
    concept = torch.randint(len(CONCEPTS), (count,), generator=generator)
    style = torch.randint(len(STYLES), (count,), generator=generator)
    return compose(sprites[concept, style], random_pose(count, generator)), concept


@torch.no_grad()
def through(ae: Any, pictures: Tensor, generator: torch.Generator, noise: float = 0.5) -> Tensor:
    """Pictures as the autoencoder gives them back, each with its own latent noise of at most ``noise``."""
    z = encode(ae, pictures)
    level = noise * torch.rand(len(z), 1, 1, 1, generator=generator)
    return ((decode(ae, z + level * torch.randn(z.shape, generator=generator)) + 1) / 2).clamp(0, 1)


def spoil(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of the batch blurred, another brightened or darkened, all with a little noise."""
    chance = torch.rand(len(pictures), 3, 1, 1, 1, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
    x = torch.where(chance[:, 0] < 0.3, blurred, pictures)
    x = x * (0.85 + 0.3 * chance[:, 1])
    return (x + 0.06 * chance[:, 2] * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def train_classifier(config: ZooConfig, ae: Any, sprites: Sprites, out: Path) -> Classifier:
    """Train for ``config.steps_classifier`` steps, resuming from ``out``."""
    torch.manual_seed(config.seed)
    art = sprites.pixels[sprites.of_concepts()]
    model = _channels_last(Classifier(list(CONCEPTS)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.02)
    average, path = Average(model, 0.995), out / "classifier.safetensors"
    step = (resume_run(path, model, optimiser, average) or {"step": 0})["step"]
    generator = torch.Generator().manual_seed(config.seed + 1 + step)
    last = config.steps_classifier
    if step < last:
        pool, labels = labelled(art, POOL, generator)
        pool[::2] = torch.cat([through(ae, part, generator) for part in pool[::2].split(64)])
    with progress("classifier", last, step) as bar:
        while step < last:
            for group in optimiser.param_groups:
                group["lr"] = LR * min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * step / last))
            where = (step * FRESH + torch.arange(FRESH)) % len(pool)
            pictures, labels[where] = labelled(art, FRESH, generator)
            pictures[::2] = through(ae, pictures[::2], generator)
            pool[where] = pictures
            index = torch.randint(len(pool), (96,), generator=generator)
            loss = F.cross_entropy(model(spoil(pool[index], generator)), labels[index], label_smoothing=0.05)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
            step += 1
            bar.advance({"loss": loss.item()})
            if step % 200 == 0 or step == last:
                save_run(path, model, optimiser, average, step=step)
    average.copy_to(model)
    return settle(model, art, generator)


@torch.no_grad()
def settle(model: Classifier, art: Tensor, generator: torch.Generator) -> Classifier:
    """Measure the batch statistics anew: those kept while training belong to the weights before averaging."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches below
    model.train()
    for _ in range(24):
        model(spoil(labelled(art, 96, generator)[0], generator))
    return model.eval().requires_grad_(False)


def judge_data(classifier: Classifier, ae: Any, sprites: Sprites, count: int = 2048) -> tuple[float, float]:
    """Top-1 on ``count`` compositions never used in training, as they are and through the autoencoder."""
    generator = torch.Generator().manual_seed(987654321)
    pictures, concept = labelled(sprites.pixels[sprites.of_concepts()], count, generator)
    names = [classifier.concepts[i] for i in concept.tolist()]
    again = torch.cat([through(ae, part, generator, noise=0.0) for part in pictures.split(64)])
    return classifier.top1(pictures, names), classifier.top1(again, names)
