"""Image to image in one step: a picture with noise up to a share of the student's time, and the student's answer to it.

    x_t = alpha_t E(picture) + sigma_t noise,   t = strength t*

where ``E`` is the autoencoder. What comes of it is an ordinary call of whatever pipeline there is, with ``latents=x_t`` and a
scheduler that begins at ``t`` (`wadi.extras.steps.schedule`): no pipeline of its own, so it goes together with ControlNets,
sizes and more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wadi.backbones import Backbone
from wadi.errors import WadiError
from wadi.extras.steps import Schedule
from wadi.io.images import read_image, to_rgb

Start = Callable[[Sequence[torch.Generator]], Tensor]

RATIO = 0.02  # by which two aspect ratios may differ and still be the same


def read_init(path: str | Path, resolution: tuple[int, int]) -> Tensor:
    """An image file as ``(1, 3, height, width)`` in [-1, 1], resized where it has the aspect ratio.

    Raises:
        WadiError: if it cannot be read (see `wadi.io.images`) or has another aspect ratio than ``resolution``
            ``(height, width)``.
    """
    return image_tensor(read_image(path), resolution, repr(str(path)))


def image_tensor(picture: Image.Image, resolution: tuple[int, int], name: str = "the picture") -> Tensor:
    """``(1, 3, height, width)`` in [-1, 1]; raises as `read_init`."""
    height, width = resolution
    if abs(picture.width * height / (picture.height * width) - 1) > RATIO:
        own = f"{picture.width}x{picture.height}"
        raise WadiError(
            f"{name} is {own} and what is drawn {width}x{height} (width x height). Expected the same aspect ratio: crop it, or "
            "draw at its size with --size."
        )
    colours = to_rgb(picture, name)
    if colours.size != (width, height):
        colours = colours.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8)
    return values.view(1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def start(backbone: Backbone, image: Tensor, schedule: Schedule) -> Start:
    """From generators, one per picture, to the ``latents`` of a call of the backbone's pipeline that redraws ``image``.

    Noise is drawn as the pipeline would draw its own, so that what a generator gives later on is fresh.

    Args:
        image: ``(1, 3, height, width)`` in [-1, 1].
        schedule: the one whose scheduler the pipeline has.
    """
    x0 = backbone.encode_images((image + 1) / 2)

    def latents(generators: Sequence[torch.Generator]) -> Tensor:
        noise = torch.cat([torch.randn(x0.shape, generator=generator) for generator in generators]).to(x0.device)
        return backbone.call_latents(schedule.alpha * x0 + schedule.sigma * noise)

    return latents
