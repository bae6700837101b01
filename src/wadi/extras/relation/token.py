"""A new token in CLIP's vocabulary: added, learned as one row of the embedding table, kept in diffusers' own format.

The table itself is never trained: while learning, the token's row is a tensor apart that a hook puts in its place, so that the
other rows stay as they are to the bit. A file holds ``{token: (n, width)}``, what ``load_textual_inversion`` reads; of a
pipeline with two encoders ``{"clip_l": ..., "clip_g": ...}`` as is the custom there. Its header says the token's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.backbones.clip_pooling import pool_at_end_token
from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.quiet import errors_only
from wadi.io.tensors import PICKLE_SUFFIXES, read_tensors
from wadi.io.weight_checks import first_names

KEYS = ("clip_l", "clip_g")  # of a file for two encoders
NAMELESS = ("emb_params", "*")  # keys that name no token; A1111 calls it as the file
CONVERT = (
    "embedding = torch.load(FILE, weights_only=True); embedding = embedding['string_to_param']['*'] if 'string_to_param' in "
    "embedding else next(iter(embedding.values())); safetensors.torch.save_file({'emb_params': embedding.detach()}, NEW_FILE)."
)


@dataclass(frozen=True)
class Tower:
    """A CLIP text encoder and its tokenizer."""

    tokenizer: Any
    encoder: Any

    @property
    def table(self) -> Tensor:
        """The embedding table ``(vocabulary, width)``, detached but shared."""
        weight: Tensor = self.encoder.get_input_embeddings().weight.detach()
        return weight

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without those of start and end."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def single(self, words: Iterable[str]) -> list[int]:
        """Ids of those ``words`` that are one token."""
        return sorted({ids[0] for word in words if len(ids := self.ids(word)) == 1})


def towers(pipeline: Any) -> list[Tower]:
    """The text encoders of a Stable Diffusion 1.x, 2.x or XL pipeline.

    Raises:
        WadiError: if one of them is not CLIP's, which has no place for a token of this kind.
    """
    found = []
    for suffix in ("", "_2", "_3"):
        tokenizer, encoder = (getattr(pipeline, name + suffix, None) for name in ("tokenizer", "text_encoder"))
        if tokenizer is None and encoder is None:
            continue
        kinds = [type(part).__name__ for part in (tokenizer, encoder)]
        if not kinds[0].startswith("CLIPTokenizer") or not kinds[1].startswith("CLIPTextModel"):
            raise WadiError(
                f"The teacher's text is read by {' and '.join(kinds)}. Expected CLIP's tokenizer and text model alone, as in "
                "Stable Diffusion 1.x, 2.x and XL: a relation token is a row of CLIP's table."
            )
        found.append(Tower(tokenizer, encoder))
    if not found or not hasattr(pipeline, "load_textual_inversion"):
        raise WadiError(
            f"{type(pipeline).__name__} takes no new tokens. Expected a pipeline of Stable Diffusion 1.x, 2.x or XL with its "
            "tokenizer and text encoder."
        )
    return found


def check_new(pipeline: Any, token: str) -> None:
    """Raise a WadiError unless ``token`` is a name in angle brackets that no tokenizer of ``pipeline`` knows yet.

    A plain word would be found inside other words too, and change them.
    """
    if not re.fullmatch(r"<[^\s<>]+>", token):
        raise WadiError(
            f"The token is {token!r}. Expected a name in angle brackets, such as '<R>'; for a file that is used, give another "
            "one by --token_name."
        )
    for tower in towers(pipeline):
        known = {name.lower() for name in tower.tokenizer.get_added_vocab()} | set(tower.tokenizer.get_vocab())
        if {token, token.lower()} & known:
            raise WadiError(
                f"Token {token!r} is already in the vocabulary (CLIP does not tell capitals apart). Expected a new name: "
                "choose another --token."
            )


def first_word(pipeline: Any, words: Iterable[str]) -> str:
    """Return the first of ``words`` that is one token of every text encoder.

    Raises:
        WadiError: if none is.
    """
    words = tuple(words)
    for word in words:
        if all(len(tower.ids(word)) == 1 for tower in towers(pipeline)):
            return word
    raise WadiError(
        f"None of {', '.join(words[:5])} and {len(words) - 5} more is one token of this teacher's vocabulary. Give a word that "
        "is, with --init."
    )


def first_rows(pipeline: Any, init: str) -> list[Tensor]:
    """Embedding of the word ``init``, ``(width,)`` float32 for each encoder, to start from.

    Raises:
        WadiError: if the word is not a single token.
    """
    rows = []
    for tower in towers(pipeline):
        ids = tower.ids(init)
        if len(ids) != 1:
            raise WadiError(
                f"The word to start from is {init!r}, which is {len(ids)} tokens of this teacher's vocabulary. Give one "
                "that is one token with --init, or leave --init out."
            )
        rows.append(tower.table[ids[0]].float().cpu().clone())
    return rows


def insert(pipeline: Any, token: str, rows: Sequence[Tensor]) -> None:
    """Add ``token`` with ``rows``, ``(width,)`` or ``(n, width)`` for each encoder, by diffusers' own means.

    Raises:
        WadiError: if the name is taken or the widths are others.
    """
    check_new(pipeline, token)
    found = towers(pipeline)
    wanted = [tower.table.shape[1] for tower in found]
    if [row.shape[-1] for row in rows] != wanted:
        raise WadiError(
            f"The token's embeddings are {_widths(rows)} wide, the text encoders {' and '.join(map(str, wanted))}. Expected a "
            "token learned on this teacher's text encoder."
        )
    counts = {1 if row.ndim == 1 else len(row) for row in rows}
    longest = min(tower.tokenizer.model_max_length for tower in found) - 2
    if len(counts) > 1 or max(counts) > longest:
        raise WadiError(
            f"The token has {' and '.join(map(str, sorted(counts)))} vectors. Expected as many for each text encoder, and "
            f"at most "
            f"{longest}, which is what a prompt can hold."
        )
    with errors_only("transformers"):  # it remarks that a table grew, at every new token
        for tower, row in zip(found, rows, strict=True):
            pipeline.load_textual_inversion(row, token=token, tokenizer=tower.tokenizer, text_encoder=tower.encoder)
            pool_at_end_token(tower.tokenizer, tower.encoder)


def _widths(rows: Sequence[Tensor]) -> str:
    return " and ".join(str(row.shape[-1]) for row in rows)


@contextmanager
def learning(pipeline: Any, token: str, rows: Sequence[Tensor]) -> Iterator[None]:
    """Within the block ``token`` means ``rows``, which gradients reach; the tables are neither read for it nor written."""
    handles = []
    for tower, row in zip(towers(pipeline), rows, strict=True):
        number = tower.tokenizer.convert_tokens_to_ids(token)

        def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor, row: Tensor = row, number: int = number) -> Tensor:
            here = (inputs[0] == number).unsqueeze(-1)
            return torch.where(here, row.to(output.device, output.dtype), output)

        handles.append(tower.encoder.get_input_embeddings().register_forward_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_token(path: Path, token: str, rows: Sequence[Tensor], about: dict[str, str]) -> None:
    """Write a learned token, whole or not at all; ``about`` goes into the header."""
    from safetensors.torch import save

    keys = (token,) if len(rows) == 1 else KEYS
    tensors = {key: row.detach().float().cpu().reshape(1, -1).contiguous() for key, row in zip(keys, rows, strict=True)}
    write_whole(path, save(tensors, metadata={"format": "pt", "token": token, **about}))


def read_token(path: Path) -> tuple[str | None, list[Tensor]]:
    """``(name, rows)`` of a textual-inversion file; the name is None where the file does not say.

    Read are diffusers' files ``{token: (n, width)}``, A1111's ``{"emb_params": (n, width)}`` and those for two encoders,
    ``{"clip_l": ..., "clip_g": ...}``, all in safetensors.

    Raises:
        WadiError: if it is something else, a pickle, or has NaN or infinite values.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file():
        raise WadiError(
            f"Token {str(path)!r} is a pickle, which can run code when it is read, and is never loaded. Where you trust the "
            f"file, convert it: {CONVERT}"
        )
    tensors, header = read_tensors(path, "Token")
    if len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        rows, token = [tensor], (header.get("token") if name in NAMELESS else name)
    else:
        rows, token = [tensors[key] for key in KEYS if key in tensors], header.get("token")
    if not rows or len(rows) != len(tensors):
        raise WadiError(
            f"{str(path)!r} holds {first_names(list(tensors)) or 'nothing'}: no textual inversion. Expected one tensor named "
            f"as its token, {NAMELESS[0]}, or {' and '.join(KEYS)}."
        )
    for name, row in tensors.items():
        if row.ndim not in (1, 2) or not row.numel() or not row.is_floating_point():
            raise WadiError(
                f"{str(path)!r} holds {name} of shape {tuple(row.shape)}: no textual inversion. Expected (width,) or (vectors, "
                "width)."
            )
    return token, rows


def add_token(pipeline: Any, file: str | Path, token: str | None = None) -> str:
    """Teach ``pipeline`` the token of ``file``, learned here or anywhere else; returns the name to use in prompts.

    Args:
        pipeline: teacher or student, Stable Diffusion 1.x, 2.x or XL; changed in place, as by ``load_textual_inversion``.
        token: another name than the file's own.
    Raises:
        WadiError: if the file holds no token, the name is taken, or it was learned on another text encoder.
    """
    own, rows = read_token(Path(file))
    name = token or own
    if name is None:
        raise WadiError(
            f"{str(file)!r} does not say what its token is called. Give it a name in angle brackets, such as '<R>' "
            f"(--token_name)."
        )
    if len(rows) != len(towers(pipeline)):
        raise WadiError(
            f"{str(file)!r} holds embeddings for {len(rows)} text encoder(s), and {type(pipeline).__name__} has "
            f"{len(towers(pipeline))}. Expected a token learned on a model of the same family."
        )
    insert(pipeline, name, rows)
    return name
