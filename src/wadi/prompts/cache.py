"""Prompt embeddings on disk: encoded once, and read row by row from memory-mapped files.

A cache is a folder with ``cache.json`` (the encoder, the digest and number of the prompts, the shapes of a row) and files
``shard-N.safetensors`` with a fixed number of rows each.

Tensors with a token axis are stored without the tokens that the network cannot see: the rows one after the other, and their
first positions as ``NAME.starts``. Texts are stored in the same way. When a row is read, the missing tokens are zeros. This
changes no result: they are masked in every attention, or were zeros already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.records import Count, Digest, Positive, Record, asdict, read_json
from wadi.io.regular import require_file
from wadi.prompts.texts import Texts

MANIFEST = "cache.json"
DIGEST = "digest"  # key in `Embeddings.encoder`: digest of the files of text encoders and tokenizers
# Keys that are compared if both sides have them. Caches of earlier versions lack some of them, or have a resolution that the
# conditions do not depend on; an encoder without files has no digest.
OPTIONAL = (DIGEST, "resolution", "arguments")
TOKENS = ("prompt_embeds", "mask")  # the tensors of a condition whose second axis is tokens
OPEN_SHARDS = 64  # most memory maps open at once


def is_cache(source: str | Path) -> bool:
    """Return whether ``source`` is an embedding cache."""
    return (Path(source) / MANIFEST).is_file()


def used_tokens(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return, per row, the number of tokens up to the last one that the network can see, shape ``(B,)``.

    A token can be seen if it is not masked, or, without a mask, if it is not zero. Return None if no tensor has a token axis.
    """
    if "prompt_embeds" not in tensors:
        return None
    visible = tensors["mask"] != 0 if "mask" in tensors else (tensors["prompt_embeds"] != 0).any(-1)
    positions = torch.arange(1, visible.shape[1] + 1, device=visible.device)
    return (visible * positions).amax(1)


def write_shard(path: Path, texts: Sequence[str], tensors: Mapping[str, Tensor], identity: Mapping[str, str]) -> None:
    """Write one shard, completely or not at all.

    Args:
        tensors: the tensors of a condition, ``(rows, ...)`` each.
        identity: stored in the file's header; `Embeddings` compares it.
    Raises:
        WadiError: if the disk is full.
    """
    from safetensors.torch import save

    used = used_tokens(tensors)
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if used is not None and name in TOKENS:
            stored[name] = torch.cat([row[:count] for row, count in zip(value, used.tolist(), strict=True)]).contiguous()
            stored[f"{name}.starts"] = _starts(used.tolist())
        else:
            stored[name] = value.contiguous()
    contents = [text.encode() for text in texts]
    stored["text"] = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
    stored["text.starts"] = _starts([len(content) for content in contents])
    write_whole(path, save({name: value.cpu() for name, value in stored.items()}, {**identity, "rows": str(len(texts))}))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of shard ``number``."""
    return folder / f"shard-{number:05d}.safetensors"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``cache.json``. It is written before the shards, so that an interrupted command can continue."""
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


class Manifest(Record):
    """The contents of ``cache.json``: encoder, digest and number of the prompts, rows per shard, shapes of a row."""

    encoder: dict[str, Any]
    prompts: Digest
    count: Positive
    shard_rows: Positive
    shapes: dict[str, list[Count]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the contents of ``cache.json``.

    Raises:
        WadiError: if it is missing or damaged.
    """
    manifest: Manifest = read_json(folder / MANIFEST, Manifest, "Embedding cache manifest")
    return asdict(manifest)


def cache_identity(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the header fields that every shard of a cache has: its encoder and its prompts."""
    return {"encoder": json.dumps(manifest["encoder"], sort_keys=True), "prompts": manifest["prompts"]}


def missing_shards(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the shards that are missing, damaged, or belong to another cache."""
    return [number for number in range(_shard_count(manifest)) if _shard_problem(folder, number, manifest) is not None]


def _shard_count(manifest: Mapping[str, Any]) -> int:
    return -(-manifest["count"] // manifest["shard_rows"])


def _shard_problem(folder: Path, number: int, manifest: Mapping[str, Any]) -> str | None:
    """Return the problem of a shard, as the end of a sentence; None if it is fine."""
    from safetensors import SafetensorError, safe_open

    path = shard_path(folder, number)
    rows = min(manifest["shard_rows"], manifest["count"] - number * manifest["shard_rows"])
    if not path.exists():
        return "is missing"
    try:
        with safe_open(require_file(path), "pt") as shard:  # checks the file's length against its header
            header = shard.metadata() or {}
            names = set(shard.keys())
            wrong_tensor = _wrong_tensor(shard, names, rows, manifest["shapes"])
    except (OSError, SafetensorError, WadiError) as error:
        return f"is damaged ({error})"
    if header != {**cache_identity(manifest), "rows": str(rows)} or not manifest["shapes"].keys() <= names:
        return "belongs to another cache"
    return None if wrong_tensor is None else f"is damaged (tensor {wrong_tensor!r} is missing or has another shape or type)"


def _wrong_tensor(shard: Any, names: set[str], rows: int, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return the first tensor of a shard (texts included) that is missing or has the wrong shape or type, or None."""
    for name, shape in {"text": (2**62,), **shapes}.items():
        if name not in names:
            return name
        size = shard.get_slice(name).get_shape()
        starts = f"{name}.starts"
        if starts not in names:
            if name == "text" or size != [rows, *shape]:
                return name
            continue
        if shard.get_slice(starts).get_dtype() != "I64" or shard.get_slice(starts).get_shape() != [rows + 1]:
            return starts
        if (
            len(size) != len(shape)
            or size[1:] != list(shape[1:])
            or (name == "text" and shard.get_slice(name).get_dtype() != "U8")
        ):
            return name
        edges = shard.get_tensor(starts)
        lengths = edges.diff()
        if edges[0] < 0 or edges[-1] > size[0] or lengths.min() < 0 or lengths.max() > shape[0]:
            return starts
    return None


def check_encoder(folder: Path, cached: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `WadiError` if the encoder of a cache differs from ``expected``. The message names the differences."""
    names = {*cached, *expected} - {name for name in OPTIONAL if name not in cached or name not in expected}
    different = [name for name in sorted(names) if cached.get(name) != expected.get(name)]
    if different:
        details = "; ".join(f"{name}: {cached.get(name)!r} in the cache, {expected.get(name)!r} here" for name in different)
        raise WadiError(
            f"Embedding cache {str(folder)!r} was written with another encoder or other settings ({details}). Write a new "
            "cache with `wadi embed`, or give the teacher that it was written with."
        )


class Embeddings(Texts):
    """A complete cache, read row by row. As a sequence it contains the texts of the prompts.

    Attributes:
        encoder: description of the encoder.
        digest: hash of the prompts.
    Raises:
        WadiError: if a shard is missing, damaged or from another cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.encoder: dict[str, Any] = self.manifest["encoder"]
        self.digest: str = self.manifest["prompts"]
        for number in range(_shard_count(self.manifest)):
            if (problem := _shard_problem(self.folder, number, self.manifest)) is not None:
                raise WadiError(
                    f"Embedding cache {str(self.folder)!r} is not complete: {shard_path(self.folder, number).name} {problem}. "
                    "Run the same `wadi embed` again: it writes the missing shards."
                )
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    def text(self, row: int) -> str:
        """Return the prompt of ``row``."""
        shard, row_in_shard = self._locate(row)
        return bytes(self._slice(shard, "text", row_in_shard).numpy()).decode()

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of a condition for these prompts, ``(len(indices), ...)`` each, as the encoder returned them."""
        return {name: torch.stack([self._row(name, int(i)) for i in indices]) for name in self.manifest["shapes"]}

    def _row(self, name: str, index: int) -> Tensor:
        shard, row = self._locate(index)
        if f"{name}.starts" not in shard.keys():  # noqa: SIM118  (a safetensors handle is not a dictionary)
            value: Tensor = shard.get_slice(name)[row]
            return value
        part = self._slice(shard, name, row)
        return torch.cat([part, part.new_zeros(self.manifest["shapes"][name][0] - len(part), *part.shape[1:])])

    @staticmethod
    def _slice(shard: Any, name: str, row: int) -> Tensor:
        """Return one row of a tensor that is stored as rows one after the other."""
        start, end = shard.get_slice(f"{name}.starts")[row : row + 2].tolist()
        part: Tensor = shard.get_slice(name)[start:end]
        return part

    def _locate(self, index: int) -> tuple[Any, int]:
        """Return the shard of a prompt, and its row there."""
        number, row = divmod(index, self.manifest["shard_rows"])
        return self._shard(number), row

    def _open(self, number: int) -> Any:
        from safetensors import safe_open

        return safe_open(require_file(shard_path(self.folder, number)), "pt").__enter__()
