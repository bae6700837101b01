"""Stable Diffusion 1.x and 2.x: a U-Net on autoencoder latents under CLIP text (``StableDiffusionPipeline``).

The prediction type (epsilon or v) and the schedule are read from the pipeline's scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition

CLIP_TOKENS = 77
BLOCKS = r"(down_blocks|mid_block|up_blocks)\..*"
ATTENTION = r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


class StableDiffusion(Backbone):
    """The backbone of a loaded ``StableDiffusionPipeline``."""

    component = "unet"
    student_targets = BLOCKS + rf"({ATTENTION}|proj_in|proj_out|time_emb_proj)"
    fake_targets = BLOCKS + ATTENTION

    @classmethod
    def default_targets(cls, config: Any) -> tuple[str, str]:
        """Return every Linear of the blocks. In SD 1.x proj_in and proj_out are convolutions, which stay frozen."""
        if config.get("use_linear_projection"):
            return cls.student_targets, cls.fake_targets
        return BLOCKS + rf"({ATTENTION}|time_emb_proj)", cls.fake_targets

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)``, as the pipeline itself encodes them."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device, 1, do_classifier_free_guidance=False, **self.encode_defaults()
        )
        return Condition({"prompt_embeds": embeds})

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Backbone.condition_shapes`."""
        return {"prompt_embeds": (CLIP_TOKENS, self.network.config.cross_attention_dim)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. The U-Net runs in its own dtype."""
        dtype = self.network.dtype
        embeds = condition.tensors["prompt_embeds"].to(dtype)
        predicted: Tensor = self.network(x_t.to(dtype), t, encoder_hidden_states=embeds, return_dict=False)[0]
        return predicted.float()
