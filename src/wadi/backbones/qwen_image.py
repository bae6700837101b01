"""Qwen-Image: a rectified flow on packed latents of a video autoencoder, under the language model of Qwen2.5-VL.

The network takes ``t / 1000``. The pipeline pads the text to the longest prompt of a call; here it is padded to the limit of
the call, 512 tokens, and masked, which changes nothing but the speed. Guidance is a second pass with the prompt ``""``, and
keeps the length of each token of the conditional prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.condition import Condition, Shape, padded
from wadi.backbones.outline import default_argument
from wadi.backbones.packed import PATCH, PackedFlow, pack, unpack
from wadi.backbones.renormalised import with_length_of

IMAGE = r"attn\.(to_q|to_k|to_v|to_out\.0)|img_mlp\.net\.(0\.proj|2)"
TEXT = r"attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)|txt_mlp\.net\.(0\.proj|2)"
BLOCKS = rf"transformer_blocks\.\d+\.({IMAGE}|{TEXT})"


class QwenImage(PackedFlow):
    """The backbone of a loaded ``QwenImagePipeline``."""

    @classmethod
    def default_targets(cls, config: Any) -> tuple[str, str]:
        """See `Backbone.default_targets`. Every Linear except those that turn the timestep into modulation.

        The text after the last block is thrown away, so the layers that only compute it are left out.
        """
        unused = rf"transformer_blocks\.{config.num_layers - 1}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)"
        blocks = rf"(?!{unused}){BLOCKS}"
        return rf"{blocks}|img_in|txt_in|proj_out", blocks

    @property
    def call(self) -> dict[str, Any]:
        """See `Backbone.call`. The scale of guidance is ``true_cfg_scale``; the network takes no ``guidance_scale``."""
        height, width = self.resolution
        return {"true_cfg_scale": 1.0, "height": height, "width": width}

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """See `Backbone.guidance_arguments`. Adds a second pass for the empty prompt."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": ""}

    def guided(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """See `Backbone.guided`. Each token keeps the length that it has in ``conditional``."""
        mixture = pack(super().guided(conditional, unconditional, guidance_scale))
        return unpack(with_length_of(mixture, pack(conditional), dim=-1), *conditional.shape[2:])

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)`` and their ``mask`` ``(B, tokens)``."""
        arguments, device = self.encode_defaults(), self.pipeline.text_encoder.device
        embeds, mask = self.pipeline.encode_prompt(list(prompts), device=device, **arguments)
        embeds, mask = padded(embeds, mask, self._tokens)
        return Condition({"prompt_embeds": embeds, "mask": mask})

    @property
    def _tokens(self) -> int:
        """Most tokens of a prompt in a plain call."""
        return int(default_argument(self.pipeline, "max_sequence_length"))

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        return {
            "prompt_embeds": (self._tokens, self.network.config.joint_attention_dim),
            "mask": ((self._tokens,), torch.int64),
        }

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``. Packs latents before the network, unpacks them after."""
        dtype, inputs = self.network.dtype, condition.tensors
        height, width = x_t.shape[2:]
        predicted: Tensor = self.network(
            hidden_states=pack(x_t.to(dtype)),
            timestep=t.to(dtype) / 1000,
            encoder_hidden_states=inputs["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=inputs["mask"],
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width).float()
