"""Stable Diffusion 3 and 3.5: a rectified flow under two CLIP encoders and T5, any of which may be absent.

The network takes ``t`` in ``[0, 1000]``, with ``sigma = t / 1000``. The scheduler's shift only changes where samplers step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition
from wadi.backbones.outline import default_argument

CLIP_TOKENS = 77
BLOCKS = r"transformer_blocks\..*"
ATTENTION = r"(attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out))"
FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)"


class StableDiffusion3(Backbone):
    """The backbone of a loaded ``StableDiffusion3Pipeline``."""

    # Every Linear except those that turn the timestep and the pooled text into modulation.
    student_targets = rf"{BLOCKS}({ATTENTION}|{FEED_FORWARD})|context_embedder|proj_out"
    fake_targets = rf"{BLOCKS}({ATTENTION}|{FEED_FORWARD})"

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)`` and ``pooled`` ``(B, width)``, with zeros for an absent encoder."""
        pipeline = self.pipeline
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            embeds, pooled = self._encode_without_clip(list(prompts))
        else:
            embeds, _, pooled, _ = pipeline.encode_prompt(
                list(prompts), None, None, device=pipeline.text_encoder.device, do_classifier_free_guidance=False,
                **self.encode_defaults(),
            )  # fmt: skip
        return Condition({"prompt_embeds": embeds, "pooled": pooled})

    def _encode_without_clip(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Do what ``pipeline.encode_prompt`` does, which needs both CLIP encoders, with zeros for the absent ones."""
        pipeline, config = self.pipeline, self.network.config
        place: dict[str, Any] = {"device": self.device, "dtype": self.network.dtype}
        pairs = (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)
        present = [self._clip(*pair, prompts) if pair[1] is not None else None for pair in pairs]
        rest = config.pooled_projection_dim - sum(part[1].shape[-1] for part in present if part)
        tokens = pipeline.tokenizer_max_length
        length = default_argument(pipeline, "max_sequence_length")
        share = rest // max(1, present.count(None))
        absent = torch.zeros(len(prompts), tokens, share), torch.zeros(len(prompts), share)
        embeds, pooled = (torch.cat([part[i].to(**place) for part in (p or absent for p in present)], dim=-1) for i in range(2))
        t5 = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length, **place)
        return torch.cat([pad(embeds, (0, t5.shape[-1] - embeds.shape[-1])), t5], dim=-2), pooled

    def _clip(self, tokenizer: Any, encoder: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return one CLIP encoder's second-to-last hidden state and its pooled embedding, as the pipeline does."""
        length = tokenizer.model_max_length
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        return out.hidden_states[-2], out[0]

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Backbone.condition_shapes`."""
        config, t5_tokens = self.network.config, default_argument(self.pipeline, "max_sequence_length")
        tokens = CLIP_TOKENS + t5_tokens
        return {"prompt_embeds": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``."""
        dtype, inputs = self.network.dtype, condition.tensors
        predicted: Tensor = self.network(
            hidden_states=x_t.to(dtype),
            timestep=t,
            encoder_hidden_states=inputs["prompt_embeds"].to(dtype),
            pooled_projections=inputs["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return predicted.float()
