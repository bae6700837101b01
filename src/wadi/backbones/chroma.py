"""Chroma: FLUX.1's blocks on packed latents, under T5 alone. A network of its own turns the timestep into modulation.

The network takes ``t / 1000``, and a mask of the text that lists the prompt and one token of padding. diffusers passes it as
numbers and adds it to the attention's logits, so the rest of the padding weighs less but is not hidden. It belongs to the
condition, and the mask's name is not ``mask``: a cache of embeddings would leave out the tokens that a ``mask`` does not list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.condition import Condition, Shape
from wadi.backbones.flux import DOUBLE, SINGLE
from wadi.backbones.outline import default_argument
from wadi.backbones.packed import PackedFlow, image_ids, pack, unpack


class Chroma(PackedFlow):
    """The backbone of a loaded ``ChromaPipeline``."""

    # Every Linear except those that turn the timestep into modulation (distilled_guidance_layer).
    student_targets = rf"{DOUBLE}|{SINGLE}|x_embedder|context_embedder|proj_out"
    fake_targets = rf"{DOUBLE}|{SINGLE}"

    def encode_with_gradient(self, prompts: Sequence[str]) -> Condition:
        """Return ``prompt_embeds`` ``(B, tokens, width)`` and ``text_weights`` ``(B, tokens)``, the numbers of the mask."""
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            **self.encode_defaults(),
        )
        return Condition({"prompt_embeds": embeds, "text_weights": mask})

    def condition_shapes(self) -> Mapping[str, Shape]:
        """See `Backbone.condition_shapes`."""
        tokens = default_argument(self.pipeline, "max_sequence_length")
        return {"prompt_embeds": (tokens, self.network.config.joint_attention_dim), "text_weights": (tokens,)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Backbone.predict`. Returns the velocity ``eps - x0``. Packs latents before the network, unpacks them after."""
        dtype, inputs = self.network.dtype, condition.tensors
        tokens, embeds = pack(x_t.to(dtype)), inputs["prompt_embeds"].to(dtype)
        mask = torch.cat([inputs["text_weights"].to(dtype), tokens.new_ones(tokens.shape[:2])], dim=1)
        with _masked_when_checkpointed(self.network, mask):
            predicted: Tensor = self.network(
                hidden_states=tokens,
                timestep=t.to(dtype) / 1000,
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=dtype),
                img_ids=image_ids(x_t, dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(predicted, *x_t.shape[2:]).float()


@contextmanager
def _masked_when_checkpointed(network: Any, mask: Tensor) -> Iterator[None]:
    """Within the block, pass ``mask`` to single blocks under gradient checkpointing too, where diffusers 0.42 leaves it out."""
    if not network.gradient_checkpointing:
        yield
        return
    inner, singles = network._gradient_checkpointing_func, set(network.single_transformer_blocks)

    def checkpoint(block: Any, *args: Any) -> Any:
        return inner(block, *args, mask) if block in singles else inner(block, *args)

    network._gradient_checkpointing_func = checkpoint
    try:
        yield
    finally:
        network._gradient_checkpointing_func = inner
