"""Flows whose pipeline packs latents 2 x 2 into tokens, as FLUX.1's does.

The tokens of the network are 2 x 2 patches of latents, with four times as many channels. Elsewhere in the package latents are
``(B, C, H, W)``. The config of the network counts the packed channels, and has no size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from wadi.backbones.base import Backbone
from wadi.diffusion.schedulers import even_sigmas

PATCH = 2  # latents per token, in each direction
SIDE = 128  # latents of the image that these pipelines generate by default


def to_tokens(latents: Tensor) -> Tensor:
    """Return latents ``(B, C, H, W)`` as tokens ``(B, H W, C)``."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens ``(B, H W, C)`` as latents ``(B, C, H, W)``; the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def pack(latents: Tensor) -> Tensor:
    """Return latents ``(B, C, H, W)`` as tokens ``(B, H W / 4, 4 C)``."""
    return to_tokens(pixel_unshuffle(latents, PATCH)).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens ``(B, H W / 4, 4 C)`` as latents ``(B, C, H, W)``; the inverse of `pack`."""
    return pixel_shuffle(from_tokens(tokens, height // PATCH, width // PATCH), PATCH)


class PackedFlow(Backbone):
    """A backbone whose pipeline packs latents and passes evenly spaced sigmas to its scheduler."""

    @property
    def patch(self) -> int:
        """The pipeline packs latents 2 x 2 into a token; the network's config does not say so."""
        return PATCH

    @staticmethod
    def native_resolution(config: Any, scale: int) -> tuple[int, int]:
        """Return the pipeline's default: the config of the network has no size."""
        return SIDE * scale, SIDE * scale

    @staticmethod
    def latent_channels(config: Any) -> int:
        """Return a quarter of the network's channels: each token is 2 x 2 latents."""
        return int(config.in_channels) // PATCH**2

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """See `Backbone.sampler_sigmas`. Evenly spaced from 1 to ``1 / steps``, before the scheduler's shift."""
        return even_sigmas(steps)

    def call_latents(self, latents: Tensor) -> Tensor:
        """See `Backbone.call_latents`. The latents are packed: ``(B, H W / 4, 4 C)``."""
        return super().call_latents(pack(latents))

    def step_noise(self, generator: torch.Generator) -> Tensor:
        """See `Backbone.step_noise`. The scheduler draws it for packed latents."""
        channels, height, width = self.latent_shape
        packed = torch.randn((1, height * width // PATCH**2, channels * PATCH**2), generator=generator)
        return unpack(packed, height, width)


def image_ids(x_t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the positions ``(tokens, 3)`` of the packed tokens of ``x_t`` ``(B, C, H, W)``: 0, row, column."""
    height, width = x_t.shape[2] // PATCH, x_t.shape[3] // PATCH
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
    return ids.to(x_t.device, dtype)
