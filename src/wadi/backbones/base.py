"""What every model family offers to the rest of the package, and nothing more.

A backbone is built from a loaded diffusers pipeline. It knows its model's inputs, latents and layers; it knows nothing of
adapters, objectives or accelerate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wadi.process import Process


@dataclass(frozen=True)
class Condition:
    """What the network is told besides ``x_t`` and ``t``: named tensors, each with the batch in front."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Condition:
        """Rows by slice, index tensor or list; always keeps the batch dimension."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """One row (the null prompt, say) repeated ``batch`` times, without a copy."""
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Every tensor moved, as by ``Tensor.to``."""
        return Condition({k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Several batches as one."""
        names = conditions[0].tensors
        return Condition({k: torch.cat([c.tensors[k] for c in conditions]) for k in names})


class Backbone(ABC):
    """A text-to-image network with its own encoder, decoder and noising process.

    Attributes:
        pipeline: the diffusers pipeline it was built from.
        network: the denoiser whose weights the adapters rotate.
        process: ``alpha_t``, ``sigma_t`` and the prediction type, from the pipeline's own scheduler.
        latent_shape: ``(C, H, W)`` of one latent.
        student_targets, fake_targets: regular expressions, full match over module names, of the layers that adapters of the
            student and of the fake model go on by default.
    """

    pipeline: Any
    network: Any
    process: Process
    latent_shape: tuple[int, int, int]
    student_targets: str
    fake_targets: str

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts to a condition of ``len(prompts)`` rows. The one encoder of training, validation and generation."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's own prediction (typed by ``process``), ``(B, C, H, W)`` in float32; ``t`` is ``(B,)``."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` to images ``(B, 3, height, width)`` in ``[0, 1]``, float32."""

    @abstractmethod
    def sampler(self) -> Any:
        """A fresh diffusers scheduler for the teacher's deterministic many-step sampling."""
