"""Prompts of pipelines that put an instruction to the text encoder before each prompt, but not before the null prompt."""

from __future__ import annotations

from collections.abc import Sequence

from wadi.backbones.base import Backbone
from wadi.backbones.condition import Condition, replace_empty_rows


def encode_instructed(backbone: Backbone, prompts: Sequence[str]) -> Condition:
    """Return ``prompt_embeds`` ``(B, tokens, width)`` and their ``mask`` ``(B, tokens)``, as `Backbone.encode_with_gradient`.

    The pipeline's null prompt is in the rows of empty prompts.
    """
    embeds, mask, null, null_mask = backbone.pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance="" in prompts,
        device=backbone.pipeline.text_encoder.device,
        **backbone.encode_defaults(),
    )
    if "" in prompts:
        embeds, mask = replace_empty_rows(prompts, null, embeds), replace_empty_rows(prompts, null_mask, mask)
    return Condition({"prompt_embeds": embeds, "mask": mask})
