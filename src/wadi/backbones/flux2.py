"""FLUX.2 dev and klein: a rectified flow whose autoencoder packs latents 2 x 2, under the hidden states of a language model.

A latent is 16 x 16 pixels, with 128 channels, and one token of the network, which takes ``t / 1000``. The shift of the
pipeline's steps depends on the number of tokens and steps, and its scheduler gets it with each call.

dev takes a guidance scale as an input of the network; we always pass 4, the default of the pipeline's call. That call has no
second pass. klein has no such input, and a second pass for the prompt ``""``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition, Shape
from wadi.backbones.flux import ATTENTION
from wadi.backbones.outline import default_argument
from wadi.backbones.packed import from_tokens, to_tokens
from wadi.diffusion import schedulers
from wadi.diffusion.autoencoder import PACKED
from wadi.errors import WadiError

SIDE = 64  # latents of the image that the pipelines generate by default
DOUBLE = rf"transformer_blocks\.\d+\.({ATTENTION}|(ff|ff_context)\.linear_(in|out))"
SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"


class Flux2Klein(Backbone):
    """The backbone of a loaded ``Flux2KleinPipeline``."""

    # Every Linear except those that turn the timestep and the guidance into modulation.
    student_targets = rf"{DOUBLE}|{SINGLE}|x_embedder|context_embedder|proj_out"
    fake_targets = rf"{DOUBLE}|{SINGLE}"
    guidance_input: ClassVar[float | None] = None  # of the network

    @property
    def scale(self) -> int:
        """Pixels per latent: the autoencoder's, packed 2 x 2."""
        return PACKED * super().scale

    @staticmethod
    def native_resolution(config: Any, scale: int) -> tuple[int, int]:
        """Return the pipeline's default: the config of the network has no size."""
        return SIDE * scale, SIDE * scale

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """See `Backbone.sampler_sigmas`. Evenly spaced from 1 to ``1 / steps``, before the shift."""
        return schedulers.even_sigmas(steps)

    def sampler_shift(self, steps: int) -> float:
        """See `Backbone.sampler_shift`. It depends on the number of steps too."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(self.image_tokens, steps))

    def step_noise(self, generator: torch.Generator) -> Tensor:
        """See `Backbone.step_noise`. The scheduler draws it for tokens."""
        channels, height, width = self.latent_shape
        tokens = torch.randn((1, height * width, channels), generator=generator)
        return from_tokens(tokens, height, width)

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)``: hidden states of three layers. Padding is not masked."""
        arguments, device = self.encode_defaults(), self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=device, **arguments)
        return Condition({"prompt_embeds": embeds})

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, self.network.config.joint_attention_dim)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``."""
        dtype, batch, height, width = self.network.dtype, len(x_t), *x_t.shape[2:]
        embeds, guidance = condition.tensors["prompt_embeds"].to(dtype), None
        if self.guidance_input is not None:
            guidance = torch.full((batch,), self.guidance_input, device=x_t.device)
        predicted: Tensor = self.network(
            hidden_states=to_tokens(x_t.to(dtype)),
            timestep=t.to(dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=_ids(1, 1, embeds.shape[1], x_t),
            img_ids=_ids(height, width, 1, x_t),
            return_dict=False,
        )[0]
        return from_tokens(predicted, height, width).float()


class Flux2(Flux2Klein):
    """The backbone of a loaded ``Flux2Pipeline``."""

    no_guidance = guidance_input = 4.0  # an input of the network, not a second pass
    default_guidance = 1.0

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """See `Backbone.guidance_arguments`.

        Raises:
            WadiError: if the scale is not 1. The pipeline's call has no second pass.
        """
        if guidance_scale == 1:
            return {"guidance_scale": cls.no_guidance}
        raise WadiError(
            f"The guidance scale is {guidance_scale}. A call of Flux2Pipeline has no second pass: give 1. Its network gets the "
            f"guidance {cls.guidance_input} as an input."
        )


def _ids(height: int, width: int, tokens: int, x_t: Tensor) -> Tensor:
    """Return positions ``(B, tokens of all, 4)``: 0, row, column, place in the text."""
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(tokens))
    return ids.to(x_t.device).expand(len(x_t), -1, -1)
