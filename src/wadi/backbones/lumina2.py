"""Lumina-Image 2.0: a rectified flow whose tokens of text and image run through the same blocks, under a Gemma text encoder.

Time and sign are the reverse of the scheduler's: the network takes ``1 - t / T``, and returns the velocity towards the image.
The pipeline puts a system prompt before each prompt, but not before the null prompt. Guidance keeps the length of the
conditional prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition, Shape
from wadi.backbones.instructed import encode_instructed
from wadi.backbones.outline import default_argument
from wadi.backbones.renormalised import with_length_of
from wadi.diffusion import schedulers

LINEARS = r"attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_[123]"
BLOCKS = rf"(layers|noise_refiner|context_refiner)\.\d+\.({LINEARS})"


class Lumina2(Backbone):
    """The backbone of a loaded ``Lumina2Pipeline``."""

    # Every Linear except those of the timestep. linear_2 of norm_out is the projection to latents.
    student_targets = rf"{BLOCKS}|x_embedder|time_caption_embed\.caption_embedder\.1|norm_out\.linear_2"
    fake_targets = BLOCKS

    def sampler_shift(self, steps: int) -> float:
        """See `Backbone.sampler_shift`. The pipeline counts the channels of a latent, not its tokens."""
        return schedulers.resolution_shift(self.pipeline.scheduler.config, self.latent_shape[0])

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """See `Backbone.sampler_sigmas`. Evenly spaced from 1 to ``1 / steps``, before the scheduler's shift."""
        return schedulers.even_sigmas(steps)

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """See `Backbone.guided`. Each row of each channel keeps the length that it has in ``conditional``."""
        return with_length_of(super().guided(conditional, unconditional, guidance_scale), conditional, dim=-1)

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)`` and their ``mask`` ``(B, tokens)``."""
        return encode_instructed(self, prompts)

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, self.network.config.cap_feat_dim), "mask": ((tokens,), torch.int64)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``, the reverse of the network's."""
        dtype, inputs = self.network.dtype, condition.tensors
        reverse: Tensor = self.network(
            hidden_states=x_t.to(dtype),
            timestep=1 - t / self.process.num_timesteps,
            encoder_hidden_states=inputs["prompt_embeds"].to(dtype),
            encoder_attention_mask=inputs["mask"],
            return_dict=False,
        )[0]
        return -reverse.float()
