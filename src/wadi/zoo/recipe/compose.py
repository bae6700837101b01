"""From sprites to training images: background, flip, size and position, for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi.zoo.concepts import COLOURS

SIDE = 64
JITTER = 0.04  # standard deviation of a background's colour about its name's, of [0, 1]


@dataclass(frozen=True)
class Pose:
    """The placement of ``B`` sprites: ``colour`` index ``(B,)``, ``rgb`` ``(B, 3)``, ``theta`` ``(B, 2, 3)``."""

    colour: Tensor
    rgb: Tensor
    theta: Tensor


def random_pose(count: int, generator: torch.Generator, smallest: float = 0.55, mirror: bool = True) -> Pose:
    """Return random poses: sides of ``smallest`` to 0.92 of the image, anywhere the sprite stays inside.

    Half of the sprites are mirrored if ``mirror`` is set.
    """
    colour = torch.randint(len(COLOURS), (count,), generator=generator)
    rgb = random_background(colour, generator)
    size = smallest + (0.92 - smallest) * torch.rand(count, generator=generator).sqrt()
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (0.6 * (0.96 - size).clamp(min=0))[:, None]
    flip = 1.0 - 2.0 * torch.randint(2, (count,), generator=generator) if mirror else torch.ones(count)
    theta = torch.zeros(count, 2, 3)
    # grid_sample maps image coordinates to sprite coordinates: u = (x - shift) / size.
    theta[:, 0, 0], theta[:, 1, 1] = flip / size, 1 / size
    theta[:, 0, 2], theta[:, 1, 2] = -flip * shift[:, 0] / size, -shift[:, 1] / size
    return Pose(colour, rgb, theta)


def random_background(colour: Tensor, generator: torch.Generator) -> Tensor:
    """Return a background ``(B, 3)`` in [0, 1] for each index ``(B,)`` of a colour, a little off its name's."""
    rgb = torch.tensor(list(COLOURS.values()))[colour] / 255
    return (rgb + JITTER * torch.randn(len(colour), 3, generator=generator)).clamp(0, 1)


def compose(sprites: Tensor, pose: Pose) -> Tensor:
    """Return images ``(B, 3, 64, 64)`` in [0, 1] from premultiplied ``uint8 (B, 4, S, S)`` sprites."""
    return over(placed(sprites, pose.theta), pose.rgb[:, :, None, None])


def placed(sprites: Tensor, theta: Tensor) -> Tensor:
    """Return premultiplied RGBA ``(B, 4, 64, 64)`` in [0, 1] of ``uint8 (B, 4, S, S)`` sprites at poses ``theta``.

    They are sampled at twice the size and averaged, so that small sprites do not alias.
    """
    grid = F.affine_grid(theta, [len(sprites), 4, 2 * SIDE, 2 * SIDE], align_corners=False)
    large = F.grid_sample(sprites.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(large, 2)


def over(layer: Tensor, below: Tensor) -> Tensor:
    """Return ``layer``, premultiplied RGBA ``(B, 4, h, w)``, on top of an image ``(B, 3, h, w)`` or a colour."""
    return layer[:, :3] + (1 - layer[:, 3:]) * below
