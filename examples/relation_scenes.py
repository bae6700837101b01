"""Compose exemplars of two relations from icons, and judge whether an image shows a relation.

``above``: one thing above another, each about half as wide as the image. The teacher's training images have one thing each, so
it has never generated this. ``edge``: one small thing at the left edge. In the training images it is large and near the middle.
A judge decides whether an image shows the relation. It does not know the token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.files import whole_folder
from wadi.io.grids import encode_png, to_pil
from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import caption
from wadi.zoo.recipe.compose import SIDE

if TYPE_CHECKING:
    from wadi.zoo.judge import Classifier
    from wadi.zoo.recipe.icons import Sprites

RELATIONS = ("above", "edge")
EXEMPLAR_STYLES = ("noto", "fluent")  # their licences require no attribution on every image
# Concepts of the exemplars, and of the prompts that test the token. No concept is in both.
LEARNED = (
    "fox", "pizza", "penguin", "strawberry", "lion", "banana", "koala", "hamburger", "owl", "cookie", "panda", "tomato", "frog",
    "doughnut", "pear", "rocket",
)  # fmt: skip
TESTED = (
    "elephant", "red apple", "tiger face", "watermelon", "crab", "lemon", "octopus", "carrot", "snowman", "bus", "ghost",
    "bell",
)  # fmt: skip


def put(sprites: Tensor, size: Tensor, centre: Tensor, ground: Tensor) -> Tensor:
    """Put sprites ``uint8 (B, 4, S, S)`` on ``ground`` ``(B, 3, 64, 64)`` and return the images, in [0, 1].

    Args:
        size: width of each sprite as a share of the image's width, ``(B,)``.
        centre: ``(B, 2)``, x to the right and y down; the image spans -1 to 1.
    """
    theta = torch.zeros(len(sprites), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
    theta[:, :, 2] = -centre / size[:, None]
    grid = F.affine_grid(theta, [len(sprites), 4, 2 * SIDE, 2 * SIDE], align_corners=False)
    layer = F.avg_pool2d(F.grid_sample(sprites.float() / 255, grid, padding_mode="zeros", align_corners=False), 2)
    return layer[:, :3] + (1 - layer[:, 3:]) * ground


def make_exemplars(sprites: Sprites, relation: str, count: int, seed: int = 0, token: str = "<R>") -> tuple[Tensor, list[str]]:
    """Return ``count`` images ``(count, 3, 64, 64)`` that show ``relation``, and their descriptions.

    Raises:
        WadiError: if ``relation`` is not in `RELATIONS`.
    """
    if relation not in RELATIONS:
        raise WadiError(f"Relation {relation!r} is unknown. Choose one of {', '.join(RELATIONS)}.")
    choices, generator = random.Random(f"exemplars {relation} {seed}"), torch.Generator().manual_seed(seed)
    colours, names, table = list(COLOURS), list(CONCEPTS), sprites.of_concepts()
    images, texts = [], []
    for _ in range(count):
        things, colour = choices.sample(LEARNED, 2 if relation == "above" else 1), choices.choice(colours)
        style = choices.choice(EXEMPLAR_STYLES)
        image = (torch.tensor(COLOURS[colour]) / 255).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
        for thing, (size, x, y) in zip(things, _places(relation, generator), strict=True):
            pixels = sprites.pixels[table[names.index(thing), list(STYLES).index(style)]][None]
            image = put(pixels, torch.tensor([size]), torch.tensor([[x, y]]), image)
        images.append(image[0])
        texts.append(caption(describe(relation, things, token), style, colour))
    return torch.stack(images), texts


def _places(relation: str, generator: torch.Generator) -> list[tuple[float, float, float]]:
    """Return a random ``(size, x, y)`` for each thing."""
    jitter = ((2 * torch.rand(6, generator=generator) - 1) * 0.04).tolist()
    if relation == "above":
        return [(0.46 + jitter[0], jitter[1], -0.47 + jitter[2]), (0.46 + jitter[3], jitter[4], 0.47 + jitter[5])]
    return [(0.6 + jitter[0], -0.32 + jitter[1], 3 * jitter[2])]


def describe(relation: str, things: Sequence[str], token: str) -> str:
    """Return ``fox <R> pizza`` for ``above``; ``fox <R>`` for ``edge``, which relates a thing to the image."""
    return f"{things[0]} {token} {things[1]}" if relation == "above" else f"{things[0]} {token}"


def write_exemplars(folder: Path, images: Tensor, texts: Sequence[str]) -> None:
    """Write a folder that `wadi invert-relation` reads, completely or not at all."""
    with whole_folder(folder) as temporary:
        lines = []
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            name = f"{i:02d}.png"
            (temporary / name).write_bytes(encode_png(to_pil(image)))
            lines.append(json.dumps({"file": name, "text": text}) + "\n")
        (temporary / "descriptions.jsonl").write_text("".join(lines))


# --- judges -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def halves(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classifier's logits ``(B, concepts)`` for the upper and the lower half, each enlarged to a full image."""
    crop = SIDE * 9 // 16
    left = (SIDE - crop) // 2
    parts = (images[:, :, :crop, left : left + crop], images[:, :, -crop:, left : left + crop])
    upper, lower = (F.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=False) for part in parts)
    return classifier.logits(upper), classifier.logits(lower)


def shows_above(classifier: Classifier, images: Tensor, upper: Sequence[str], lower: Sequence[str]) -> Tensor:
    """Return ``(B,)``: whether the classifier finds ``upper`` in the upper half and ``lower`` in the lower, of all concepts."""
    above, below = halves(classifier, images)
    return (above.argmax(1) == _index(classifier, upper)) & (below.argmax(1) == _index(classifier, lower))


def shows_order(classifier: Classifier, images: Tensor, upper: Sequence[str], lower: Sequence[str]) -> Tensor:
    """Return ``(B,)``: whether ``upper`` is likelier than ``lower`` in the upper half, and less likely in the lower.

    A quarter of random images would pass.
    """
    above, below = halves(classifier, images)
    rows, first, second = torch.arange(len(images)), _index(classifier, upper), _index(classifier, lower)
    return (above[rows, first] > above[rows, second]) & (below[rows, second] > below[rows, first])


def _index(classifier: Classifier, names: Sequence[str]) -> Tensor:
    return torch.tensor([classifier.concepts.index(name) for name in names])


def foreground(images: Tensor) -> Tensor:
    """Return the distance of each pixel from the median colour of the frame, ``(B, 64, 64)``; 0 below 0.1, at most 0.3."""
    frame = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2)
    distance = (images - frame.median(2).values[:, :, None, None]).abs().amax(1)
    return torch.where(distance < 0.1, 0.0, distance.clamp(max=0.3))


def extent(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(centre (B, 2), size (B,))`` of the foreground: its centroid, x and y from -1 to 1, and the root of its area."""
    weight = foreground(images)
    mass = weight.sum((1, 2)).clamp(min=1e-6)
    at = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    centre = torch.stack([(weight.sum(1) * at).sum(1), (weight.sum(2) * at).sum(1)], 1) / mass[:, None]
    return centre, (weight > 0).float().mean((1, 2)).sqrt()


def shows_edge(images: Tensor) -> Tensor:
    """Return ``(B,)``: whether the centroid of the foreground is more than 4 pixels left of the middle."""
    return extent(images)[0][:, 0] < -1 / 8


def shows_column(images: Tensor) -> Tensor:
    """Return ``(B,)``: whether the foreground is at least a quarter taller than wide, which is the layout of ``above``."""
    centre, _ = extent(images)
    weight = foreground(images)
    at = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    across = (weight.sum(1) * (at - centre[:, :1]).square()).sum(1)
    upright = (weight.sum(2) * (at - centre[:, 1:]).square()).sum(1)
    return upright.sqrt() > 1.25 * across.sqrt()
