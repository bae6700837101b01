"""Sana: a rectified flow with linear attention on the latents of a 32x autoencoder, under a Gemma text encoder.

The pipeline puts an instruction to Gemma before each prompt, but not before the null prompt. The feed-forward layers are
convolutions: two of kernel size 1, which have most of the weights and take angles like a Linear, and a depthwise one between
them, which stays frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition, Shape
from wadi.backbones.instructed import encode_instructed
from wadi.backbones.outline import default_argument

ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff\.(conv_inverted|conv_point)"


class Sana(Backbone):
    """The backbone of a loaded ``SanaPipeline``."""

    student_targets = rf"{ATTENTION}|{FEED_FORWARD}|caption_projection\.linear_[12]|proj_out"
    fake_targets = rf"{ATTENTION}|{FEED_FORWARD}"

    @property
    def call(self) -> dict[str, Any]:
        """See `Backbone.call`. Turns off the pipeline's resizing to the nearest training size."""
        return {**super().call, "use_resolution_binning": False}

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)`` and their ``mask`` ``(B, tokens)``."""
        return encode_instructed(self, prompts)

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, self.network.config.caption_channels), "mask": ((tokens,), torch.int64)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``. Some checkpoints take a multiple of ``t``."""
        dtype, inputs = self.network.dtype, condition.tensors
        predicted: Tensor = self.network(
            x_t.to(dtype),
            encoder_hidden_states=inputs["prompt_embeds"].to(dtype),
            encoder_attention_mask=inputs["mask"],
            timestep=t * self.network.config.timestep_scale,
            return_dict=False,
        )[0]
        return predicted[:, : x_t.shape[1]].float()
