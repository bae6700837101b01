"""What the kinds of embedded teachers share with their training, and what each says for itself: `Kind`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wadi.parallel.device import computes_with_bfloat16

SIDE = 16  # of the latents
GAMMA = 5.0  # signal-to-noise ratio above which a timestep's weight falls
DROP = 0.1  # captions replaced by the empty prompt


class Kind(ABC):
    """A kind of teacher: its pipeline, its images and captions, and its loss.

    Class attributes:
        name: value of ``--model``.
        network: name of the network in the pipeline.
        text: module with its tokenizer and text encoder (`text.py`, `t5_text.py`).
        file: name of the files of its training in ``OUT``, without suffix.
        label_size: numbers in a label, which says what an image shows.
        minutes: default training time.
        to_adam: parts of names of weights that Adam trains, besides those that it always does.
        shows_pairs: whether its images may show two things.
        guidance_scale, steps: of the images that measure it.
    """

    name: ClassVar[str]
    network: ClassVar[str]
    text: ClassVar[Any]
    file: ClassVar[str]
    label_size: ClassVar[int]
    minutes: ClassVar[float]
    to_adam: ClassVar[tuple[str, ...]] = ()
    shows_pairs: ClassVar[bool] = False
    guidance_scale: ClassVar[float]
    steps: ClassVar[int]

    def build(self, tokenizer: Any) -> nn.ModuleDict:
        """Return the untrained network and ``text_encoder``."""
        return nn.ModuleDict({self.network: self.build_network(), "text_encoder": self.text.build_text_encoder(tokenizer)})

    @abstractmethod
    def build_network(self) -> Any:
        """Return the untrained network."""

    @abstractmethod
    def build_scheduler(self) -> Any:
        """Return the scheduler of its pipeline."""

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """``alpha_t^2`` of its schedule, ``(T,)``."""
        table: Tensor = self.build_scheduler().alphas_cumprod
        return table

    @abstractmethod
    def assemble(self, ae: Any, model: nn.ModuleDict, tokenizer: Any) -> Any:
        """Return the pipeline of these parts."""

    @abstractmethod
    def labels(self, count: int | None, generator: torch.Generator) -> Tensor:
        """Return ``count`` random labels ``(count, label_size)``; None = those that an image pool starts with."""

    @abstractmethod
    def latents(self, ae: Any, sprites: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents ``(B, 12, 16, 16)`` of new images of ``labels``, and their labels with everything that was drawn.

        Args:
            sprites: ``(concepts, styles, 4, S, S)``.
        """

    @abstractmethod
    def captions(self, labels: Tensor, generator: torch.Generator) -> list[str]:
        """Return a random caption for each row of labels. A share ``DROP`` of them is empty."""

    @abstractmethod
    def loss(
        self, model: nn.ModuleDict, tokenizer: Any, texts: Sequence[str], x0: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss at random timesteps of latents ``x0`` ``(B, 12, 16, 16)`` with these captions."""

    @abstractmethod
    def fixed_prompts(self) -> list[str]:
        """Return a dozen prompts for grids."""


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products in training: bfloat16 where the device computes with it, else float32."""
    return torch.bfloat16 if computes_with_bfloat16(device) else torch.float32


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Use bfloat16 products where they are fast, and on the CPU attention without the fused kernel.

    The backward pass of fused attention in bfloat16 took a quarter of a training step there, for at most 64 tokens.
    """
    dtype = product_dtype(device)
    plain = sdpa_kernel([SDPBackend.MATH]) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), plain:
        yield


def placed_like(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Return tensors, drawn on the CPU, on the device of ``like``."""
    return [tensor.to(like.device) for tensor in tensors]
