"""Where CLIP's pooled embedding is taken: at the end token, also when the vocabulary has grown.

Published text encoders (SDXL's second one, for instance) say ``eos_token_id: 2``, which is wrong. `transformers` then pools at
the largest id of the prompt. That is the end token of the original vocabulary, but a learned token has a larger id and would be
pooled instead, so that the words after it did not enter the pooled embedding.
"""

from __future__ import annotations

from typing import Any

LEGACY = 2  # the value of `eos_token_id` with which transformers pools at the largest id


def pool_at_end_token(tokenizer: Any, encoder: Any) -> None:
    """Correct ``eos_token_id`` of a CLIP text encoder whose vocabulary has more tokens than CLIP's own; in place.

    Prompts without new tokens have the same embeddings before and after, bit for bit: their end token is their largest id.
    ``save_pretrained`` keeps the correction. Any other encoder is left as it is.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    config: Any = getattr(encoder, "config", None)
    if end is None or getattr(config, "model_type", "") != "clip_text_model" or config.eos_token_id != LEGACY:
        return
    if len(tokenizer) - 1 > end:
        config.eos_token_id = end
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == LEGACY:
                module.eos_token_id = end


def pool_pipeline_at_end_token(pipeline: Any) -> None:
    """`pool_at_end_token` for each text encoder of a pipeline that has its tokenizer."""
    for suffix in ("", "_2", "_3"):
        pool_at_end_token(getattr(pipeline, f"tokenizer{suffix}", None), getattr(pipeline, f"text_encoder{suffix}", None))
