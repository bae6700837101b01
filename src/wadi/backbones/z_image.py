"""Z-Image: a rectified flow whose tokens of image and caption run through the same blocks, under a Qwen3 text encoder.

The network takes lists: the images and the captions of a batch, each caption with its own number of tokens. Its time and sign
are the reverse of the scheduler's: it takes ``1 - t / 1000`` and returns ``x0 - eps``. The guidance scale of the pipeline's
call counts from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition, Shape, as_list, from_list
from wadi.backbones.outline import default_argument
from wadi.diffusion.schedulers import even_sigmas

SIDE = 1024  # pixels of the image that the pipeline generates by default
BLOCKS = r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])"


class ZImage(Backbone):
    """The backbone of a loaded ``ZImagePipeline``."""

    # Every Linear except those that turn the timestep into modulation.
    student_targets = rf"{BLOCKS}|all_x_embedder\..*|cap_embedder\.1|all_final_layer\.[^.]+\.linear"
    fake_targets = BLOCKS

    @property
    def patch(self) -> int:
        """The first of the patch sizes that the network has, which the pipeline uses."""
        return int(self.network.config.all_patch_size[0])

    @staticmethod
    def native_resolution(config: Any, scale: int) -> tuple[int, int]:
        """Return the pipeline's default: the config of the network has no size."""
        return SIDE, SIDE

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)``, padded, and their ``mask`` ``(B, tokens)``."""
        captions, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            **self.encode_defaults(),
        )
        return Condition(from_list(captions, default_argument(self.pipeline, "max_sequence_length")))

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, self.network.config.cap_feat_dim), "mask": ((tokens,), torch.bool)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``, the reverse of the network's."""
        dtype = self.network.dtype
        reverse = self.network(
            list(x_t.to(dtype).unsqueeze(2)),  # each image is one frame
            (1000 - t) / 1000,
            [caption.to(dtype) for caption in as_list(condition)],
            return_dict=False,
        )[0]
        return -torch.stack([image.float() for image in reverse]).squeeze(2)

    # --- plain calls of the pipeline ----------------------------------------------------------------------------------------

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """See `Backbone.sampler_sigmas`. Evenly spaced from 1 to ``1 / steps``, before the scheduler's shift."""
        return even_sigmas(steps)

    @classmethod
    def guidance_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """See `Backbone.guidance_arguments`. The call computes ``cond + w (cond - uncond)``, so 0 means none."""
        return {"guidance_scale": guidance_scale - 1}

    def call_latents(self, latents: Tensor) -> Tensor:
        """See `Backbone.call_latents`. The call holds latents in float32, whatever the network's dtype."""
        return latents.float()

    def as_seen(self, x_t: Tensor) -> Tensor:
        """See `Backbone.as_seen`. The call computes each step from latents in float32."""
        return x_t
