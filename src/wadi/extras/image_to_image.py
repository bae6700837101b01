"""Image to image in one step: add noise to an image up to a share of the student's time, and let the student predict ``x0``.

    x_t = alpha_t E(image) + sigma_t noise,   t = strength t*

``E`` is the autoencoder. The rest is an ordinary call of the pipeline, with ``latents=x_t`` and a scheduler that begins at
``t`` (`wadi.extras.steps.schedule`). No pipeline class of its own is needed, so it can be combined with ControlNets, other
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

RATIO = 0.02  # relative difference between two aspect ratios that are treated as equal


def read_init(path: str | Path, resolution: tuple[int, int]) -> Tensor:
    """Return an image file as ``(1, 3, height, width)`` in [-1, 1], resized if its aspect ratio is that of ``resolution``.

    Args:
        resolution: ``(height, width)`` in pixels.
    Raises:
        WadiError: if it cannot be read (see `wadi.io.images`) or has another aspect ratio.
    """
    return image_tensor(read_image(path), resolution, repr(str(path)))


def image_tensor(image: Image.Image, resolution: tuple[int, int], name: str = "the image") -> Tensor:
    """Return an image as ``(1, 3, height, width)`` in [-1, 1]. Resizes and raises as `read_init`; ``name`` is for errors."""
    height, width = resolution
    if abs(image.width * height / (image.height * width) - 1) > RATIO:
        raise WadiError(
            f"{name} is {image.width}x{image.height}, and the generated image is {width}x{height} (width x height). Their "
            "aspect ratios must be equal: crop the image, or generate at its size with --size."
        )
    rgb = to_rgb(image, name)
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return values.view(1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def start_from(backbone: Backbone, image: Tensor, schedule: Schedule) -> Start:
    """Return a function from generators, one for each generated image, to the ``latents`` of the pipeline's call.

    Noise is drawn as the pipeline draws its own, so later draws from the same generator are independent of it.

    Args:
        image: the image to start from, ``(1, 3, height, width)`` in [-1, 1].
        schedule: the one whose scheduler the pipeline has.
    """
    x0 = backbone.encode_images((image + 1) / 2)

    def latents(generators: Sequence[torch.Generator]) -> Tensor:
        noise = torch.cat([torch.randn(x0.shape, generator=generator) for generator in generators]).to(x0.device)
        return backbone.call_latents(schedule.alpha * x0 + schedule.sigma * noise)

    return latents
