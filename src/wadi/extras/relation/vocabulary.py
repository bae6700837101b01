"""Add a token to CLIP's vocabulary, and replace its embedding while it is learned.

The embedding table itself is never trained. While a token is learned, a hook puts a separate tensor in the place of its row, so
that all other rows stay as they are, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wadi.backbones.clip_pooling import pool_at_end_token
from wadi.errors import WadiError
from wadi.io.quiet import errors_only


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder and its tokenizer."""

    tokenizer: Any
    model: Any

    @property
    def table(self) -> Tensor:
        """The embedding table ``(vocabulary, width)``: detached, but it shares memory with the model."""
        weight: Tensor = self.model.get_input_embeddings().weight.detach()
        return weight

    def ids_of(self, text: str) -> list[int]:
        """Return the token ids of a text, without those of start and end."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def id_of(self, token: str) -> int:
        """Return the id of a token that is in the vocabulary."""
        number: int = self.tokenizer.convert_tokens_to_ids(token)
        return number

    def single_token_ids(self, words: Iterable[str]) -> list[int]:
        """Return the ids of those ``words`` that are one token, sorted."""
        return sorted({ids[0] for word in words if len(ids := self.ids_of(word)) == 1})

    def nearest_words(self, row: Tensor, token: str, count: int = 5) -> list[str]:
        """Return the ``count`` vocabulary entries whose embeddings are nearest to ``row`` by cosine, without ``token``."""
        cosines = F.normalize(self.table.float(), dim=-1) @ F.normalize(row.float().to(self.table.device), dim=-1)
        cosines[self.id_of(token)] = -2
        names: list[str] = self.tokenizer.convert_ids_to_tokens(cosines.topk(count).indices.tolist())
        return [name.removesuffix("</w>") for name in names]


def text_encoders(pipeline: Any) -> list[TextEncoder]:
    """Return the text encoders of a Stable Diffusion 1.x, 2.x or XL pipeline.

    Raises:
        WadiError: if one of them is not CLIP, or the pipeline has none.
    """
    encoders = []
    for suffix in ("", "_2", "_3"):
        tokenizer, model = (getattr(pipeline, name + suffix, None) for name in ("tokenizer", "text_encoder"))
        if tokenizer is None and model is None:
            continue
        kinds = [type(part).__name__ for part in (tokenizer, model)]
        if not kinds[0].startswith("CLIPTokenizer") or not kinds[1].startswith("CLIPTextModel"):
            raise WadiError(
                f"The teacher reads text by {' and '.join(kinds)}. A relation token is a row of CLIP's embedding table: use "
                "Stable Diffusion 1.x, 2.x or XL."
            )
        encoders.append(TextEncoder(tokenizer, model))
    if not encoders or not hasattr(pipeline, "load_textual_inversion"):
        raise WadiError(
            f"{type(pipeline).__name__} takes no new tokens. Use a pipeline of Stable Diffusion 1.x, 2.x or XL with its "
            "tokenizer and text encoder."
        )
    return encoders


def check_new_token(pipeline: Any, token: str) -> None:
    """Raise `WadiError` unless ``token`` is a name in angle brackets that no tokenizer of ``pipeline`` has yet.

    A plain word would also be found inside other words, and change them.
    """
    if not re.fullmatch(r"<[^\s<>]+>", token):
        raise WadiError(
            f"The token is {token!r}. Give a name in angle brackets, such as '<R>'. --token-name gives the token of a "
            "file another name."
        )
    for encoder in text_encoders(pipeline):
        vocabulary = {name.lower() for name in encoder.tokenizer.get_added_vocab()} | set(encoder.tokenizer.get_vocab())
        if {token, token.lower()} & vocabulary:
            raise WadiError(
                f"Token {token!r} is already in the vocabulary (CLIP does not distinguish capitals). Choose another --token."
            )


def first_single_token(pipeline: Any, words: Iterable[str]) -> str:
    """Return the first of ``words`` that is one token of every text encoder.

    Raises:
        WadiError: if there is none.
    """
    words = tuple(words)
    for word in words:
        if all(len(encoder.ids_of(word)) == 1 for encoder in text_encoders(pipeline)):
            return word
    raise WadiError(
        f"None of {', '.join(words[:5])} and {len(words) - 5} more is one token of this teacher's vocabulary. Give a word that "
        "is, with --init."
    )


def embeddings_of(pipeline: Any, word: str) -> list[Tensor]:
    """Return the embedding of ``word`` for each text encoder: copies ``(width,)``, float32, on the CPU.

    Raises:
        WadiError: if the word is not a single token.
    """
    rows = []
    for encoder in text_encoders(pipeline):
        ids = encoder.ids_of(word)
        if len(ids) != 1:
            raise WadiError(
                f"The word to start from is {word!r}, which is {len(ids)} tokens of this teacher's vocabulary. Give one "
                "that is one token with --init, or leave --init out."
            )
        rows.append(encoder.table[ids[0]].float().cpu().clone())
    return rows


def insert_token(pipeline: Any, token: str, rows: Sequence[Tensor]) -> None:
    """Add ``token`` with diffusers' ``load_textual_inversion``.

    Args:
        rows: ``(width,)`` or ``(vectors, width)`` for each text encoder.
    Raises:
        WadiError: if the name is taken, or the shapes do not fit the text encoders.
    """
    check_new_token(pipeline, token)
    encoders = text_encoders(pipeline)
    widths = [encoder.table.shape[1] for encoder in encoders]
    if [row.shape[-1] for row in rows] != widths:
        raise WadiError(
            f"The token's embeddings are {_joined(row.shape[-1] for row in rows)} wide, those of the text encoders "
            f"{_joined(widths)}. Use a token that was learned on this teacher's text encoder."
        )
    vectors = {1 if row.ndim == 1 else len(row) for row in rows}
    longest = min(encoder.tokenizer.model_max_length for encoder in encoders) - 2
    if len(vectors) > 1 or max(vectors) > longest:
        raise WadiError(
            f"The token has {_joined(sorted(vectors))} vectors. It needs equally many for each text encoder, and at most "
            f"{longest}, which is all that fits into a prompt."
        )
    with errors_only("transformers"):  # it remarks that a table grew, at every new token
        for encoder, row in zip(encoders, rows, strict=True):
            pipeline.load_textual_inversion(row, token=token, tokenizer=encoder.tokenizer, text_encoder=encoder.model)
            pool_at_end_token(encoder.tokenizer, encoder.model)


def _joined(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))


@contextmanager
def replaced_embeddings(pipeline: Any, token: str, rows: Sequence[Tensor]) -> Iterator[None]:
    """Within the block ``token`` has the embeddings ``rows``, and they receive gradients. The tables are not changed."""
    handles = []
    for encoder, row in zip(text_encoders(pipeline), rows, strict=True):
        number = encoder.id_of(token)

        def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor, row: Tensor = row, number: int = number) -> Tensor:
            is_token = (inputs[0] == number).unsqueeze(-1)
            return torch.where(is_token, row.to(output.device, output.dtype), output)

        handles.append(encoder.model.get_input_embeddings().register_forward_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
