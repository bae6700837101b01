"""PixArt-alpha and PixArt-Sigma: a transformer under T5 text, with a linear beta schedule.

The network predicts noise and, in the second half of its channels, a variance, which no sampler here uses. T5's padding is
masked in cross-attention. Models for 1024 pixels may also take the resolution and the aspect ratio as inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition, Shape
from wadi.backbones.outline import default_argument

LINEARS = r"transformer_blocks\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


class PixArt(Backbone):
    """The backbone of a loaded ``PixArtAlphaPipeline`` or ``PixArtSigmaPipeline``."""

    # Every Linear except those of the timestep, under adaln_single.
    student_targets = LINEARS + r"|caption_projection\.linear_[12]|proj_out"
    fake_targets = LINEARS

    @property
    def call(self) -> dict[str, Any]:
        """See `Backbone.call`. Turns off the pipeline's resizing to the nearest training size."""
        return {**super().call, "use_resolution_binning": False, "clean_caption": self._clean_caption}

    def encode_defaults(self) -> dict[str, Any]:
        """See `Backbone.encode_defaults`. Says whether captions are cleaned, which depends on the installed libraries."""
        return {**super().encode_defaults(), "clean_caption": self._clean_caption}

    @property
    def condition_has_size(self) -> bool:  # type: ignore[override]
        """Whether the network takes the resolution as an input."""
        return bool(self.network.use_additional_conditions)

    @property
    def _clean_caption(self) -> bool:
        """Whether a plain call cleans captions. That needs two libraries; without them it warns and encodes the raw prompt."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        default = default_argument(self.pipeline, "clean_caption")
        return bool(default and is_bs4_available() and is_ftfy_available())

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)``, their ``mask`` ``(B, tokens)`` and, for some models, the size."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            **self.encode_defaults(),
        )
        return Condition({"prompt_embeds": embeds, "mask": mask, **self._sizes(len(embeds), embeds.device)})

    def _sizes(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        if not self.network.use_additional_conditions:
            return {}
        height, width = self.resolution
        sizes = {"size": [float(height), float(width)], "aspect_ratio": [height / width]}
        return {name: torch.tensor([values], device=device).repeat(batch, 1) for name, values in sizes.items()}

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        sizes = {"size": (2,), "aspect_ratio": (1,)} if self.network.use_additional_conditions else {}
        return {"prompt_embeds": (tokens, self.network.config.caption_channels), "mask": ((tokens,), torch.int64), **sizes}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. The learned variance is dropped."""
        dtype, inputs = self.network.dtype, condition.tensors
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if "size" in inputs:
            sizes = {"resolution": inputs["size"].to(dtype), "aspect_ratio": inputs["aspect_ratio"].to(dtype)}
        predicted: Tensor = self.network(
            x_t.to(dtype),
            encoder_hidden_states=inputs["prompt_embeds"].to(dtype),
            encoder_attention_mask=inputs["mask"],
            timestep=t,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return predicted[:, : x_t.shape[1]].float()
