"""FLUX.1 dev and schnell: a rectified flow on packed latents under CLIP's pooled embedding and T5.

The network takes tokens of 2 x 2 latents (`wadi.backbones.packed`) with their positions as ids, and ``t / 1000``.

FLUX.1 dev takes a guidance scale as an input of the network. We always pass 3.5, the default of the pipeline's own call: for
teacher, student and fake model, in training, generation and evaluation. The ``guidance_scale`` of a run or command adds true
guidance with a second pass; the family's default is 1, which means none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.condition import Condition
from wadi.backbones.outline import default_argument
from wadi.backbones.packed import PackedFlow, image_ids, pack, unpack

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
DOUBLE = rf"transformer_blocks\.\d+\.({ATTENTION}|(ff|ff_context)\.net\.(0\.proj|2))"
SINGLE = rf"single_transformer_blocks\.\d+\.({ATTENTION}|proj_mlp|proj_out)"


class Flux(PackedFlow):
    """The backbone of a loaded ``FluxPipeline``."""

    # Every Linear except those that turn the timestep, the guidance and the pooled text into modulation.
    student_targets = rf"{DOUBLE}|{SINGLE}|x_embedder|context_embedder|proj_out"
    fake_targets = rf"{DOUBLE}|{SINGLE}"
    no_guidance = 3.5  # an input of the network, not a second pass
    default_guidance = 1.0

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """See `Backbone.guidance_arguments`. Adds a second pass for the empty prompt; the input of the network stays 3.5."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": ""}

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)`` of T5 and ``pooled`` ``(B, width)`` of CLIP."""
        device = self.pipeline.text_encoder.device
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=device, **self.encode_defaults())
        return Condition({"prompt_embeds": embeds, "pooled": pooled})

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Backbone.condition_shapes`."""
        config, tokens = self.network.config, default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``. Packs latents before the network, unpacks them after."""
        dtype, inputs = self.network.dtype, condition.tensors
        embeds = inputs["prompt_embeds"].to(dtype)
        guidance = None
        if self.network.config.guidance_embeds:
            rows = x_t.shape[0]  # not len(x_t), which a tracer takes for a constant
            guidance = torch.full((rows,), self.no_guidance, device=x_t.device)
        predicted: Tensor = self.network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.to(dtype) / 1000,
            guidance=guidance,
            pooled_projections=inputs["pooled"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=dtype),
            img_ids=image_ids(x_t, dtype),
            return_dict=False,
        )[0]
        return unpack(predicted, *x_t.shape[2:]).float()
