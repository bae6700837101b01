"""Check that tokenizers are complete, can distinguish two texts, and have no token that the text encoder cannot embed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wadi.backbones.weight_files import components
from wadi.errors import WadiError

FILE = "tokenizer_file"  # transformers' key for tokenizer.json, which is enough by itself
TEXTS = ("red apple", "blue fox")


def check_vocabulary_files(index: Mapping[str, Any], folder: Path) -> None:
    """Raise `WadiError` if a tokenizer of a pipeline folder lacks the files of its vocabulary.

    Without them transformers silently builds an empty tokenizer, and all texts get the same tokens.

    Args:
        index: the contents of ``model_index.json``.
    """
    import transformers

    for component, (_, name) in components(index).items():
        files: Mapping[str, str] = getattr(getattr(transformers, name, None), "vocab_files_names", None) or {}
        if not component.startswith("tokenizer") or not files:
            continue
        place, single = folder / component, files.get(FILE, "tokenizer.json")
        others = [file for key, file in files.items() if key != FILE]
        absent = [file for file in others if not (place / file).is_file()]
        if not (place / single).is_file() and (absent or not others):
            raise WadiError(
                f"The tokenizer in {str(place)!r} has no vocabulary: {', '.join([single, *absent])} "
                f"{'are' if absent else 'is'} missing. Download or save the pipeline again; {single} is enough."
            )


def check_tokenizers(pipeline: Any, folder: Path) -> None:
    """Raise `WadiError` if a tokenizer of a loaded pipeline gives all texts the same tokens, or does not fit its text encoder.

    Args:
        folder: the folder that the pipeline was loaded from.
    """
    for component, tokenizer in pipeline.components.items():
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # FLUX.2 dev has a processor, of text and images
        if component.startswith("tokenizer") and tokenizer is not None:
            _check_distinct_tokens(tokenizer, folder / component)
            encoder = pipeline.components.get(component.replace("tokenizer", "text_encoder"))
            if hasattr(encoder, "get_input_embeddings"):
                check_vocabulary_size(tokenizer, encoder, repr(str(folder / component)))


def _check_distinct_tokens(tokenizer: Any, place: Path) -> None:
    one, other = (tokenizer(text).input_ids for text in TEXTS)
    if one == other:
        raise WadiError(
            f"The tokenizer in {str(place)!r} gives {TEXTS[0]!r} and {TEXTS[1]!r} the same tokens (its vocabulary has "
            f"{len(tokenizer)} words). Its files are incomplete: download or save the pipeline again."
        )


def check_vocabulary_size(tokenizer: Any, encoder: Any, what: str) -> None:
    """Raise `WadiError` if ``tokenizer`` has a token that ``encoder`` has no embedding for.

    Args:
        what: name of the tokenizer in the message.
    """
    embedding = encoder.get_input_embeddings()
    rows = embedding.weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise WadiError(
            f"The tokenizer {what} has token numbers up to {largest}, but its text encoder has only {rows} embeddings. Use the "
            "tokenizer that the text encoder was saved with, or resize its embedding (resize_token_embeddings)."
        )
