"""The DiT's tokenizer and text encoder: T5's classes, with the captions' words as vocabulary."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wadi.zoo.prompts import AND, training_prompts

HIDDEN = 192
SPECIAL = ("<pad>", "</s>", "<unk>")  # with the numbers that T5 gives them


def vocabulary() -> list[tuple[str, float]]:
    """Return the pieces of words and their log-probabilities.

    Each word of the captions is one piece. All printable ASCII characters are pieces too, so any English text can be spelt.
    """
    words = sorted({word.strip(",") for prompt in training_prompts() for word in prompt.split()} | {AND})
    letters = [character for character in string.printable if not character.isspace()]
    pieces = {0.0: SPECIAL, -5.0: [f"▁{word}" for word in words], -10.0: ["▁", *letters]}
    return [(piece, score) for score, group in pieces.items() for piece in group]


def write_tokenizer(folder: Path) -> None:
    """Write T5's tokenizer with `vocabulary`."""
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    T5Tokenizer(vocab=vocabulary(), extra_ids=0).save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """Load the ``T5Tokenizer`` of a folder that `write_tokenizer` filled."""
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[Any, Any]:
    """Return token ids and their mask, ``(B, L)`` each, padded to the longest prompt.

    ``PixArtAlphaPipeline`` pads to 120 tokens. They are masked everywhere, so the result is the same.
    """
    encoded = tokenizer(list(prompts), padding=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def build_text_encoder(tokenizer: Any) -> Any:
    """Return an untrained ``T5EncoderModel`` with states ``(B, L, HIDDEN)``."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=HIDDEN,
            d_kv=HIDDEN // 6,
            d_ff=2 * HIDDEN,
            num_layers=3,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
