"""Stable Diffusion 1.x and 2.x: a U-Net on autoencoder latents under CLIP text (``StableDiffusionPipeline``).

Epsilon- and v-prediction both; which one, and the schedule, are read from the pipeline's scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.base import Backbone, Condition
from wadi.process import Process

BLOCKS = r"(down_blocks|mid_block|up_blocks)\..*"
ATTENTION = r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


class StableDiffusion(Backbone):
    """Backbone contract over a loaded ``StableDiffusionPipeline``."""

    # Every Linear of the blocks; in SD 1.x proj_in and proj_out are convolutions, which stay frozen.
    student_targets = BLOCKS + rf"({ATTENTION}|proj_in|proj_out|time_emb_proj)"
    fake_targets = BLOCKS + ATTENTION

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.network = pipeline.unet
        self.process = Process.from_scheduler(pipeline.scheduler)
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.network.config.in_channels, height, width)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds`` ``(B, tokens, width)``, as the pipeline itself encodes them."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
        return Condition({"prompt_embeds": embeds})

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`; runs in the U-Net's own dtype."""
        dtype = self.network.dtype
        embeds = condition.tensors["prompt_embeds"].to(dtype)
        predicted: Tensor = self.network(x_t.to(dtype), t, encoder_hidden_states=embeds, return_dict=False)[0]
        return predicted.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Backbone.decode`; runs in the autoencoder's own dtype."""
        vae = self.pipeline.vae
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def sampler(self) -> Any:
        """DDIM over the model's own schedule, from its last timestep."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(
            self.pipeline.scheduler.config,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        )
