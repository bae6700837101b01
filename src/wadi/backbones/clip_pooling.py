"""Take CLIP's pooled embedding at the end token, also after new tokens were added to the vocabulary.

The configs of published text encoders (such as SDXL's second one) have ``eos_token_id: 2``, which is wrong. For this value
`transformers` pools at the largest token id of the prompt. In the original vocabulary that is the end token. But a learned
token has a larger id: the encoder would pool there, and the pooled embedding would not include the words after it.
"""

from __future__ import annotations

from typing import Any

LEGACY = 2  # the `eos_token_id` for which transformers pools at the largest id


def pool_at_end_token(tokenizer: Any, encoder: Any) -> None:
    """Correct, in place, the ``eos_token_id`` of a CLIP text encoder whose vocabulary has more tokens than CLIP's own.

    Prompts without new tokens have the same embeddings before and after, bit for bit: their end token is their largest id.
    ``save_pretrained`` saves the correction. Other encoders are not changed.
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
    """Apply `pool_at_end_token` to each text encoder of a pipeline that has its tokenizer."""
    for suffix in ("", "_2", "_3"):
        pool_at_end_token(getattr(pipeline, f"tokenizer{suffix}", None), getattr(pipeline, f"text_encoder{suffix}", None))
