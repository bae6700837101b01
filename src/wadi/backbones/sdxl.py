"""Stable Diffusion XL and its fine-tunes: a U-Net under two text encoders and size conditioning.

Two more inputs of the network are the pooled embedding of the second encoder and ``add_time_ids`` ``(B, 6)``: original size,
crop corner and target size in pixels. A plain call sets them to (height, width), (0, 0) and (height, width).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wadi.backbones.condition import Condition, replace_empty_rows
from wadi.backbones.sd import StableDiffusion

TIME_IDS = 6


class StableDiffusionXL(StableDiffusion):
    """The backbone of a loaded ``StableDiffusionXLPipeline``."""

    condition_has_size = True

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)``, ``pooled`` ``(B, width)`` and ``time_ids`` ``(B, 6)``.

        The null prompt is all zeros if the pipeline's config says so (``force_zeros_for_empty_prompt``).
        """
        pipeline = self.pipeline
        embeds, null, pooled, null_pooled = pipeline.encode_prompt(
            list(prompts), device=pipeline.text_encoder_2.device, do_classifier_free_guidance="" in prompts,
            **self.encode_defaults(),
        )  # fmt: skip
        if "" in prompts:
            embeds, pooled = replace_empty_rows(prompts, null, embeds), replace_empty_rows(prompts, null_pooled, pooled)
        return Condition({"prompt_embeds": embeds, "pooled": pooled, "time_ids": self._time_ids(pooled)})

    def _time_ids(self, pooled: Tensor) -> Tensor:
        width = self.pipeline.text_encoder_2.config.projection_dim
        ids = self.pipeline._get_add_time_ids(self.resolution, (0, 0), self.resolution, torch.float32, width)
        return ids.to(pooled.device).repeat(len(pooled), 1)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Backbone.condition_shapes`."""
        config = self.network.config
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        return {**super().condition_shapes(), "pooled": (pooled,), "time_ids": (TIME_IDS,)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. The U-Net runs in its own dtype."""
        dtype, inputs = self.network.dtype, condition.tensors
        predicted: Tensor = self.network(
            x_t.to(dtype),
            t,
            encoder_hidden_states=inputs["prompt_embeds"].to(dtype),
            added_cond_kwargs={"text_embeds": inputs["pooled"].to(dtype), "time_ids": inputs["time_ids"].to(dtype)},
            return_dict=False,
        )[0]
        return predicted.float()
