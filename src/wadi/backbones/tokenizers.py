"""Tokenizers that belong to their text encoders: complete, able to tell two texts apart, and not larger than the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wadi.backbones.stored import components
from wadi.errors import WadiError

FILE = "tokenizer_file"  # how transformers calls tokenizer.json, which suffices alone
TEXTS = ("red apple", "blue fox")


def refuse_absent_files(index: Mapping[str, Any], folder: Path) -> None:
    """Raise `WadiError` if a tokenizer of a pipeline folder lacks the files with its vocabulary.

    Without them transformers builds an empty tokenizer and says nothing: all texts become the same tokens.

    Args:
        index: the contents of ``model_index.json``.
    """
    import transformers

    for component, (_, name) in components(index).items():
        known: Mapping[str, str] = getattr(getattr(transformers, name, None), "vocab_files_names", None) or {}
        if not component.startswith("tokenizer") or not known:
            continue
        place, single = folder / component, known.get(FILE, "tokenizer.json")
        others = [file for key, file in known.items() if key != FILE]
        absent = [file for file in others if not (place / file).is_file()]
        if not (place / single).is_file() and (absent or not others):
            raise WadiError(
                f"The tokenizer in {str(place)!r} has no vocabulary: {', '.join([single, *absent])} "
                f"{'are' if absent else 'is'} missing. Download or save the pipeline again; {single} is enough."
            )


def refuse_misfits(pipeline: Any, folder: Path) -> None:
    """Raise `WadiError` if a tokenizer of a loaded pipeline gives all texts the same tokens, or does not fit its text encoder.

    Args:
        folder: where the pipeline was loaded from.
    """
    for component, tokenizer in pipeline.components.items():
        if component.startswith("tokenizer") and tokenizer is not None:
            _refuse_blind(tokenizer, folder / component)
            encoder = pipeline.components.get(component.replace("tokenizer", "text_encoder"))
            if hasattr(encoder, "get_input_embeddings"):
                refuse_larger(tokenizer, encoder, repr(str(folder / component)))


def _refuse_blind(tokenizer: Any, place: Path) -> None:
    one, other = (tokenizer(text).input_ids for text in TEXTS)
    if one == other:
        raise WadiError(
            f"The tokenizer in {str(place)!r} gives {TEXTS[0]!r} and {TEXTS[1]!r} the same tokens ({len(tokenizer)} words in "
            "its vocabulary). Its files are incomplete: download or save the pipeline again."
        )


def refuse_larger(tokenizer: Any, encoder: Any, what: str) -> None:
    """Raise `WadiError` if ``tokenizer`` (``what`` in the message) has a token that ``encoder`` has no embedding for."""
    embedding = encoder.get_input_embeddings()
    rows = embedding.weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise WadiError(
            f"The tokenizer {what} has tokens up to number {largest}, and its text encoder embeds only {rows}. Use the "
            "tokenizer that the text encoder was saved with, or resize its embedding (resize_token_embeddings)."
        )
