"""Token files: textual inversions in diffusers' own format.

A file has one tensor ``{token: (vectors, width)}``, as ``load_textual_inversion`` reads it. For two text encoders it has two:
``{"clip_l": ..., "clip_g": ...}``, as other tools write them. The header gives the token's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.errors import WadiError
from wadi.extras.relation.vocabulary import insert_token, text_encoders
from wadi.io.files import write_whole
from wadi.io.tensors import PICKLE_SUFFIXES, read_tensors
from wadi.io.weight_checks import first_names

TWO_ENCODERS = ("clip_l", "clip_g")  # keys of a file for two encoders
NAMELESS = ("emb_params", "*")  # keys that do not give the token's name: A1111 calls it by the file's name
CONVERT = (
    "embedding = torch.load(FILE, weights_only=True); embedding = embedding['string_to_param']['*'] if 'string_to_param' in "
    "embedding else next(iter(embedding.values())); safetensors.torch.save_file({'emb_params': embedding.detach()}, NEW_FILE)."
)


def write_token(path: Path, token: str, rows: Sequence[Tensor], about: dict[str, str]) -> None:
    """Write a learned token, completely or not at all.

    Args:
        rows: ``(width,)`` for each text encoder.
        about: more entries of the header.
    """
    from safetensors.torch import save

    keys = (token,) if len(rows) == 1 else TWO_ENCODERS
    tensors = {key: row.detach().float().cpu().reshape(1, -1).contiguous() for key, row in zip(keys, rows, strict=True)}
    write_whole(path, save(tensors, metadata={"format": "pt", "token": token, **about}))


def read_token(path: Path) -> tuple[str | None, list[Tensor]]:
    """Return the name and the embeddings of a token; the name is None if the file does not give one.

    This reads diffusers' files ``{token: (vectors, width)}``, A1111's ``{"emb_params": (vectors, width)}`` and those for two
    encoders, ``{"clip_l": ..., "clip_g": ...}``, all in safetensors.

    Raises:
        WadiError: if the file is something else or a pickle, or has NaN or infinite values.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file():
        raise WadiError(
            f"Token {str(path)!r} is a pickle, which can run code when it is read, and is never loaded. If you trust the file, "
            f"convert it: {CONVERT}"
        )
    tensors, header = read_tensors(path, "Token")
    if len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        rows, token = [tensor], (header.get("token") if name in NAMELESS else name)
    else:
        rows, token = [tensors[key] for key in TWO_ENCODERS if key in tensors], header.get("token")
    if not rows or len(rows) != len(tensors):
        raise WadiError(
            f"{str(path)!r} contains {first_names(list(tensors)) or 'nothing'}, so it is not a textual inversion. That has one "
            f"tensor named as its token, {NAMELESS[0]}, or {' and '.join(TWO_ENCODERS)}."
        )
    for name, row in tensors.items():
        if row.ndim not in (1, 2) or not row.numel() or not row.is_floating_point():
            raise WadiError(
                f"{str(path)!r} has {name} of shape {tuple(row.shape)} and type {row.dtype}, so it is not a textual inversion. "
                "That has floating-point tensors of shape (width,) or (vectors, width)."
            )
    return token, rows


def add_token(pipeline: Any, file: str | Path, token: str | None = None) -> str:
    """Add the token of ``file`` to ``pipeline``, whether it was learned here or anywhere else.

    Args:
        pipeline: teacher or student, Stable Diffusion 1.x, 2.x or XL; changed in place, as by ``load_textual_inversion``.
        token: name to use in prompts; None = the name in the file.

    Returns:
        The name to use in prompts.
    Raises:
        WadiError: if the file contains no token, the name is taken, or it was learned on another text encoder.
    """
    stored_name, rows = read_token(Path(file))
    name = token or stored_name
    if name is None:
        raise WadiError(
            f"{str(file)!r} does not give its token a name. Give it one in angle brackets, such as '<R>' (--token-name)."
        )
    if len(rows) != len(text_encoders(pipeline)):
        raise WadiError(
            f"{str(file)!r} has embeddings for {len(rows)} text encoder(s), and {type(pipeline).__name__} has "
            f"{len(text_encoders(pipeline))}. Use a token that was learned on a model of the same family."
        )
    insert_token(pipeline, name, rows)
    return name
