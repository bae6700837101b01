"""The judge: a small convolutional network that names the concept of an image, trained on the emoji data alone.

Its training images are compositions of emoji. Half of them pass through the autoencoder with noise on the latent, and both
halves are blurred and noised at random, so it stays reliable on generated images. It never sees an image of the teacher. Its
``FEATURES`` penultimate activations are the features of the metric ``fd-zoo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.io.records import Record, Side, read_json
from wadi.io.tensors import read_tensors

FEATURES = 96
WIDTHS = (24, 48, 80, 112)


def _block(fan_in: int, fan_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """A network from images ``(B, 3, 64, 64)`` in [0, 1] to ``concepts``.

    Use it in ``eval()``, as ``load_classifier`` returns it.
    """

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
        """Return the penultimate activations ``(B, FEATURES)``."""
        h = self.body((2 * images - 1).contiguous(memory_format=torch.channels_last))
        return F.silu(self.project(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)))

    def logits(self, images: Tensor) -> Tensor:
        """Return unnormalised log-probabilities ``(B, len(concepts))``."""
        return self.head(self.features(images))

    forward = logits

    @torch.no_grad()
    def top1(self, images: Tensor, concepts: list[str], batch: int = 128) -> float:
        """Return the share of images whose most probable concept is the given one."""
        best = torch.cat([self.logits(part).argmax(1) for part in images.split(batch)]).tolist()
        return sum(self.concepts[i] == name for i, name in zip(best, concepts, strict=True)) / len(concepts)

    @torch.no_grad()
    def top2(self, images: Tensor, pairs: list[tuple[str, str]], batch: int = 128) -> float:
        """Return the share of images whose two most probable concepts are the given two, in either order.

        It needs a judge that learned images of two things.
        """
        best = torch.cat([self.logits(part).topk(2).indices for part in images.split(batch)]).tolist()
        named = [{self.concepts[i] for i in two} for two in best]
        return sum(found == set(pair) for found, pair in zip(named, pairs, strict=True)) / len(pairs)


def channels_last(classifier: Any) -> Any:
    """Return the classifier with its weights in channels-last memory format."""
    return classifier.to(memory_format=torch.channels_last)  # untyped: torch's stubs do not know the argument


class Config(Record):
    """``config.json`` of a classifier."""

    concepts: list[str]
    features: Side


def read_classifier(folder: Path) -> Classifier:
    """Read a classifier that `wadi.zoo.recipe.judge_training.save_classifier` wrote, in float32 and ready to use."""
    config: Config = read_json(folder / "config.json", Config, "Classifier config")
    classifier = Classifier(config.concepts, config.features)
    classifier.load_state_dict(read_tensors(folder / "model.safetensors", "Classifier")[0])
    return channels_last(classifier.eval().requires_grad_(False))
