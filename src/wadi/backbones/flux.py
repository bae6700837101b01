"""FLUX.1 dev and schnell: a rectified flow on packed latents under CLIP's pooled embedding and T5.

The tokens of the network are 2 x 2 patches of latents, with their positions as ids. Outside this file latents are
``(B, C, H, W)``. The network takes ``t / 1000``.

FLUX.1 dev takes a guidance scale as an input of the network. We always pass 3.5, the default of the pipeline's own call: for
teacher, student and fake model, in training, generation and evaluation. The ``guidance_scale`` of a run or command adds true
guidance with a second pass; the family's default is 1, which means none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition
from wadi.backbones.outline import default_argument

PATCH = 2  # latents per token, in each direction
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
DOUBLE = rf"transformer_blocks\.\d+\.({ATTENTION}|(ff|ff_context)\.net\.(0\.proj|2))"

SINGLE = rf"single_transformer_blocks\.\d+\.({ATTENTION}|proj_mlp|proj_out)"


class Flux(Backbone):
    """The backbone of a loaded ``FluxPipeline``."""

    # Every Linear except those that turn the timestep, the guidance and the pooled text into modulation.
    student_targets = rf"{DOUBLE}|{SINGLE}|x_embedder|context_embedder|proj_out"
    fake_targets = rf"{DOUBLE}|{SINGLE}"
    no_guidance = 3.5  # an input of the network, not a second pass
    default_guidance = 1.0

    @property
    def patch(self) -> int:
        """The pipeline packs latents 2 x 2 into a token; the network's config does not say so."""
        return PATCH

    @staticmethod
    def native_resolution(config: Any, scale: int) -> tuple[int, int]:
        """Return the pipeline's default: the config of the network has no size."""
        return 128 * scale, 128 * scale

    @staticmethod
    def latent_channels(config: Any) -> int:
        """Return a quarter of the network's channels: each token is 2 x 2 latents."""
        return int(config.in_channels) // PATCH**2

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """See `Backbone.guidance_arguments`. Adds a second pass for the empty prompt; the input of the network stays 3.5."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": ""}

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """See `Backbone.sampler_sigmas`. Evenly spaced from 1 to ``1 / steps``, before the scheduler's shift."""
        return [1 - i / steps for i in range(steps)]

    def call_latents(self, latents: Tensor) -> Tensor:
        """See `Backbone.call_latents`. The latents are packed: ``(B, H W / 4, 4 C)``."""
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return super().call_latents(packed)

    def step_noise(self, generator: torch.Generator) -> Tensor:
        """See `Backbone.step_noise`. The scheduler draws it for packed latents."""
        channels, height, width = self.latent_shape
        packed = torch.randn((1, height * width // PATCH**2, channels * PATCH**2), generator=generator)
        unpacked: Tensor = self.pipeline._unpack_latents(packed, height * self.scale, width * self.scale, self.scale)
        return unpacked

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
        from diffusers import FluxPipeline

        dtype, inputs = self.network.dtype, condition.tensors
        batch, channels, height, width = x_t.shape
        embeds = inputs["prompt_embeds"].to(dtype)
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((batch,), self.no_guidance, device=x_t.device)
        predicted: Tensor = self.network(
            hidden_states=FluxPipeline._pack_latents(x_t.to(dtype), batch, channels, height, width),
            timestep=t.to(dtype) / 1000,
            guidance=guidance,
            pooled_projections=inputs["pooled"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // PATCH, width // PATCH, x_t.device, dtype),
            return_dict=False,
        )[0]
        pixels = height * self.scale, width * self.scale
        unpacked: Tensor = FluxPipeline._unpack_latents(predicted, *pixels, self.scale)
        return unpacked.float()
