"""Sana: a rectified flow with linear attention on the latents of a 32x autoencoder, under a Gemma text encoder.

Prompts are put behind the pipeline's own instruction to Gemma; the null prompt is not. Feed-forward layers are convolutions:
two of kernel 1, which hold most of the weights and take angles like a Linear, around a depthwise one, which stays frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.base import Backbone, Condition, default_argument, where_empty

ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff\.(conv_inverted|conv_point)"


class Sana(Backbone):
    """Backbone contract over a loaded ``SanaPipeline``."""

    student_targets = rf"{ATTENTION}|{FEED_FORWARD}|caption_projection\.linear_[12]|proj_out"
    fake_targets = rf"{ATTENTION}|{FEED_FORWARD}"

    @property
    def call(self) -> dict[str, Any]:
        """See `Backbone.call`: without resizing to the nearest size of training."""
        return {**super().call, "use_resolution_binning": False}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds`` ``(B, tokens, width)`` with their ``mask`` ``(B, tokens)``."""
        embeds, mask, null, null_mask = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance="" in prompts,
            device=self.pipeline.text_encoder.device,
            **self.encode_defaults(),
        )
        if "" in prompts:
            embeds, mask = where_empty(prompts, null, embeds), where_empty(prompts, null_mask, mask)
        return Condition({"prompt_embeds": embeds, "mask": mask})

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, self.network.config.caption_channels), "mask": (tokens,)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`: the velocity ``eps - x0``; some checkpoints are fed a multiple of ``t``."""
        dtype, told = self.network.dtype, condition.tensors
        predicted: Tensor = self.network(
            x_t.to(dtype),
            encoder_hidden_states=told["prompt_embeds"].to(dtype),
            encoder_attention_mask=told["mask"],
            timestep=t * self.network.config.timestep_scale,
            return_dict=False,
        )[0]
        return predicted[:, : x_t.shape[1]].float()
