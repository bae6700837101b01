"""Exemplars of relations that can be checked, laid out of the icons: what `wadi invert-relation` learns from, and the judges.

Two relations. ``above``: one thing over another, each of about half the side; the teacher was taught one thing a picture, so
that this asks for what it has never drawn. ``edge``: one thing small and at the left edge, where the teacher is used to having
it large and near the middle. A judge says of a picture whether it shows the relation, never having seen the token.
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
DRAWN_STYLES = ("noto", "fluent")  # of the exemplars: the sets whose licences ask for no attribution on every picture
# Concepts of the exemplars and of the prompts that test the token, which share none.
LEARNED = (
    "fox", "pizza", "penguin", "strawberry", "lion", "banana", "koala", "hamburger", "owl", "cookie", "panda", "tomato", "frog",
    "doughnut", "pear", "rocket",
)  # fmt: skip
TESTED = (
    "elephant", "red apple", "tiger face", "watermelon", "crab", "lemon", "octopus", "carrot", "snowman", "bus", "ghost",
    "bell",
)  # fmt: skip


def lay(sprites: Tensor, size: Tensor, centre: Tensor, ground: Tensor) -> Tensor:
    """Sprites ``uint8 (B, 4, S, S)`` on ``ground`` ``(B, 3, 64, 64)``: pictures in [0, 1].

    Args:
        size: of the side of the picture, ``(B,)``.
        centre: ``(B, 2)``, x to the right and y down, the picture spanning -1 to 1.
    """
    theta = torch.zeros(len(sprites), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
    theta[:, :, 2] = -centre / size[:, None]
    grid = F.affine_grid(theta, [len(sprites), 4, 2 * SIDE, 2 * SIDE], align_corners=False)
    layer = F.avg_pool2d(F.grid_sample(sprites.float() / 255, grid, padding_mode="zeros", align_corners=False), 2)
    return layer[:, :3] + (1 - layer[:, 3:]) * ground


def make_exemplars(sprites: Sprites, relation: str, count: int, seed: int = 0, token: str = "<R>") -> tuple[Tensor, list[str]]:
    """``count`` pictures ``(count, 3, 64, 64)`` that show ``relation``, and their descriptions.

    Raises:
        WadiError: on a relation that is not in `RELATIONS`.
    """
    if relation not in RELATIONS:
        raise WadiError(f"Relation {relation!r} is not known. Expected one of {', '.join(RELATIONS)}.")
    draw, generator = random.Random(f"exemplars {relation} {seed}"), torch.Generator().manual_seed(seed)
    colours, names, table = list(COLOURS), list(CONCEPTS), sprites.of_concepts()
    pictures, texts = [], []
    for _ in range(count):
        things, colour = draw.sample(LEARNED, 2 if relation == "above" else 1), draw.choice(colours)
        style = draw.choice(DRAWN_STYLES)
        picture = (torch.tensor(COLOURS[colour]) / 255).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
        for thing, (size, x, y) in zip(things, _places(relation, generator), strict=True):
            pixels = sprites.pixels[table[names.index(thing), list(STYLES).index(style)]][None]
            picture = lay(pixels, torch.tensor([size]), torch.tensor([[x, y]]), picture)
        pictures.append(picture[0])
        texts.append(caption(describe(relation, things, token), style, colour))
    return torch.stack(pictures), texts


def _places(relation: str, generator: torch.Generator) -> list[tuple[float, float, float]]:
    """``(size, x, y)`` of each thing."""
    jitter = ((2 * torch.rand(6, generator=generator) - 1) * 0.04).tolist()
    if relation == "above":
        return [(0.46 + jitter[0], jitter[1], -0.47 + jitter[2]), (0.46 + jitter[3], jitter[4], 0.47 + jitter[5])]
    return [(0.6 + jitter[0], -0.32 + jitter[1], 3 * jitter[2])]


def describe(relation: str, things: Sequence[str], token: str) -> str:
    """``fox <R> pizza``, or ``fox <R>`` where the second party is the picture itself."""
    return f"{things[0]} {token} {things[1]}" if relation == "above" else f"{things[0]} {token}"


def write_exemplars(folder: Path, pictures: Tensor, texts: Sequence[str]) -> None:
    """The folder that `wadi invert-relation` reads, whole or not at all."""
    with whole_folder(folder) as temporary:
        lines = []
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            name = f"{i:02d}.png"
            (temporary / name).write_bytes(encode_png(to_pil(picture)))
            lines.append(json.dumps({"file": name, "text": text}) + "\n")
        (temporary / "descriptions.jsonl").write_text("".join(lines))


# --- judges -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def halves(classifier: Classifier, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The classifier's logits ``(B, concepts)`` of the upper and of the lower half, each enlarged to a picture."""
    crop = SIDE * 9 // 16
    left = (SIDE - crop) // 2
    parts = (pictures[:, :, :crop, left : left + crop], pictures[:, :, -crop:, left : left + crop])
    upper, lower = (F.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=False) for part in parts)
    return classifier.logits(upper), classifier.logits(lower)


def shows_above(classifier: Classifier, pictures: Tensor, upper: Sequence[str], lower: Sequence[str]) -> Tensor:
    """``(B,)``: the classifier names ``upper`` in the upper half and ``lower`` in the lower one, out of all concepts."""
    above, below = halves(classifier, pictures)
    return (above.argmax(1) == _index(classifier, upper)) & (below.argmax(1) == _index(classifier, lower))


def shows_order(classifier: Classifier, pictures: Tensor, upper: Sequence[str], lower: Sequence[str]) -> Tensor:
    """``(B,)``: of the two alone, ``upper`` is the likelier one above and ``lower`` below; a quarter by chance."""
    above, below = halves(classifier, pictures)
    rows, first, second = torch.arange(len(pictures)), _index(classifier, upper), _index(classifier, lower)
    return (above[rows, first] > above[rows, second]) & (below[rows, second] > below[rows, first])


def _index(classifier: Classifier, names: Sequence[str]) -> Tensor:
    return torch.tensor([classifier.concepts.index(name) for name in names])


def foreground(pictures: Tensor) -> Tensor:
    """How far each pixel is from the ground, the median colour of the frame: ``(B, 64, 64)`` in [0, 1], 0 below 0.1."""
    frame = torch.cat([pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, :, 0], pictures[:, :, :, -1]], 2)
    away = (pictures - frame.median(2).values[:, :, None, None]).abs().amax(1)
    return torch.where(away < 0.1, 0.0, away.clamp(max=0.3))


def extent(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """``(centre (B, 2), size (B,))`` of what is drawn: its centroid, x and y from -1 to 1, and the root of its area."""
    weight = foreground(pictures)
    mass = weight.sum((1, 2)).clamp(min=1e-6)
    at = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    centre = torch.stack([(weight.sum(1) * at).sum(1), (weight.sum(2) * at).sum(1)], 1) / mass[:, None]
    return centre, (weight > 0).float().mean((1, 2)).sqrt()


def shows_edge(pictures: Tensor) -> Tensor:
    """``(B,)``: the centroid of what is drawn lies more than an eighth of the half side, 4 pixels, left of the middle."""
    return extent(pictures)[0][:, 0] < -1 / 8


def shows_column(pictures: Tensor) -> Tensor:
    """``(B,)``: what is drawn spreads up and down at least a quarter more than sideways: the layout of ``above`` alone."""
    centre, _ = extent(pictures)
    weight = foreground(pictures)
    at = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    across = (weight.sum(1) * (at - centre[:, :1]).square()).sum(1)
    upright = (weight.sum(2) * (at - centre[:, 1:]).square()).sum(1)
    return upright.sqrt() > 1.25 * across.sqrt()
