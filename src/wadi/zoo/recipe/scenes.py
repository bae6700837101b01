"""Scenes of one or two sprites on a background: what the DiT learns from.

Two things are beside each other, one above the other, or at an angle, at sizes of their own; the first may cover a part of the
second. A label is ``(first, second, style, colour)``, with ``second = -1`` for a scene of one thing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import caption, pair
from wadi.zoo.recipe.compose import over, placed, random_background, random_pose

PAIRS = 0.5  # share of the scenes that have two things
SMALLEST, LARGEST = 0.40, 0.58  # side of a sprite beside another, as a share of the image's
NEAREST = 0.75  # distance of two sprites, as a share of the one at which they touch


def random_labels(count: int, generator: torch.Generator, pairs: float = PAIRS) -> Tensor:
    """Return ``count`` random labels ``(count, 4)``. The two things of a pair differ."""
    concepts = len(CONCEPTS)
    first = torch.randint(concepts, (count,), generator=generator)
    second = (first + torch.randint(1, concepts, (count,), generator=generator)) % concepts
    second = second.where(torch.rand(count, generator=generator) < pairs, torch.tensor(-1))
    style = torch.randint(len(STYLES), (count,), generator=generator)
    colour = torch.randint(len(COLOURS), (count,), generator=generator)
    return torch.stack([first, second, style, colour], 1)


def random_scenes(sprites: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``(B, 3, 64, 64)`` in [0, 1] of ``labels`` ``(B, 4)``, from ``sprites`` ``(concepts, styles, 4, S, S)``."""
    rgb = random_background(labels[:, 3], generator)
    single = random_pose(len(labels), generator, smallest=0.66, mirror=False).theta
    front, behind = random_pair_of_poses(len(labels), generator)
    labels, rgb, single, front, behind = (drawn.to(sprites.device) for drawn in (labels, rgb, single, front, behind))
    first, second, style, _ = labels.unbind(1)
    is_pair = second >= 0
    below = placed(sprites[second.clamp_min(0), style], behind) * is_pair[:, None, None, None]
    above = placed(sprites[first, style], front.where(is_pair[:, None, None], single))
    return over(above, over(below, rgb[:, :, None, None]))


def random_pair_of_poses(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the poses of the first and the second sprite of ``count`` pairs, ``(count, 2, 3)`` each."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    size = SMALLEST + (LARGEST - SMALLEST) * uniform(count, 2)
    angle = 2 * math.pi * uniform(count)
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    direction = direction / direction.abs().amax(1, keepdim=True)  # on a square, so that distances are those of squares
    distance = size.sum(1) * (NEAREST + (1 - NEAREST) * uniform(count))
    room = 1 - size[:, :, None]  # how far a sprite's centre may be from the image's, which is from -1 to 1
    offsets = torch.stack([direction, -direction], 1) * distance[:, None, None] / 2
    shift = (2 * uniform(count, 1, 2) - 1) * (room - offsets.abs()).amin(1, keepdim=True).clamp_min(0)
    centres = (offsets + shift).clamp(-room, room)
    theta = torch.zeros(count, 2, 2, 3)
    theta[..., 0, 0] = theta[..., 1, 1] = 1 / size
    theta[..., 2] = -centres / size[:, :, None]
    return theta[:, 0], theta[:, 1]


def captions(labels: Tensor, generator: torch.Generator, drop: float) -> list[str]:
    """Return a caption for each label; style and colour are each named half of the time, and a share ``drop`` is empty."""
    u = torch.rand(len(labels), 3, generator=generator).tolist()
    names, styles, colours = list(CONCEPTS), list(STYLES), list(COLOURS)

    def things(first: int, second: int) -> str:
        return names[first] if second < 0 else pair(names[first], names[second])

    rows: Sequence[Sequence[int]] = labels.tolist()
    return [
        "" if empty < drop else caption(things(i, j), styles[s] if a < 0.5 else None, colours[k] if b < 0.5 else None)
        for (i, j, s, k), (a, b, empty) in zip(rows, u, strict=True)
    ]
