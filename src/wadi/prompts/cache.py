"""Prompt embeddings on disk: encoded once, read as memory-mapped rows, refused when another encoder made them.

A cache is a folder: ``cache.json`` (what encoded it, digest and number of the prompts, row shapes) and ``shard-N.safetensors``,
each with so many rows. Tensors with a token axis hold only the tokens that the network can see, one row after the other, with
``NAME.starts``; texts are kept likewise. Restored tokens are zeros: what is cut is masked in every attention, or zero already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.records import Count, Digest, Positive, Record, asdict, read_json
from wadi.io.regular import regular

MANIFEST = "cache.json"
DIGEST = "digest"  # of the files of text encoders and tokenizers, in what `Embeddings.encoder` says
TOKENS = ("prompt_embeds", "mask")  # tensors of a condition whose second axis is tokens
OPEN_SHARDS = 64  # memory maps held at once


def is_cache(source: str | Path) -> bool:
    """Whether ``source`` is a folder that this module wrote."""
    return (Path(source) / MANIFEST).is_file()


def used_tokens(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Per row, tokens up to the last that the network can see, ``(B,)``: unmasked, or where there is no mask not zero."""
    if "prompt_embeds" not in tensors:
        return None
    seen = tensors["mask"] != 0 if "mask" in tensors else (tensors["prompt_embeds"] != 0).any(-1)
    positions = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    return (seen * positions).amax(1)


def write_shard(path: Path, texts: Sequence[str], tensors: Mapping[str, Tensor], identity: Mapping[str, str]) -> None:
    """One shard, whole or not at all.

    Args:
        tensors: of a condition, ``(rows, ...)`` each.
        identity: kept in the file, compared by `Embeddings`.
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
    """Where shard ``number`` lies."""
    return folder / f"shard-{number:05d}.safetensors"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """``cache.json``; written before the shards, so that an interrupted cache knows what it is of."""
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


class Manifest(Record):
    """``cache.json``: what encoded the prompts, their digest and number, rows per shard, shape of a row by tensor."""

    encoder: dict[str, Any]
    prompts: Digest
    count: Positive
    shard_rows: Positive
    shapes: dict[str, list[Count]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        WadiError: if it is missing or damaged.
    """
    manifest: Manifest = read_json(folder / MANIFEST, Manifest, "Embedding cache manifest")
    return asdict(manifest)


def identity_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What every shard of a cache says it belongs to."""
    return {"encoder": json.dumps(manifest["encoder"], sort_keys=True), "prompts": manifest["prompts"]}


def missing_shards(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Numbers of the shards that are not there, are damaged, or belong to another cache."""
    return [number for number in range(_shards(manifest)) if _trouble(folder, number, manifest) is not None]


def _shards(manifest: Mapping[str, Any]) -> int:
    return -(-manifest["count"] // manifest["shard_rows"])


def _trouble(folder: Path, number: int, manifest: Mapping[str, Any]) -> str | None:
    from safetensors import SafetensorError, safe_open

    path = shard_path(folder, number)
    rows = min(manifest["shard_rows"], manifest["count"] - number * manifest["shard_rows"])
    if not path.exists():
        return "is missing"
    try:
        with safe_open(regular(path), "pt") as shard:  # checks the file's length against its header
            told = shard.metadata() or {}
            names = set(shard.keys())
            wrong = _misshapen(shard, names, rows, manifest["shapes"])
    except (OSError, SafetensorError, WadiError) as error:
        return f"is damaged ({error})"
    if told != {**identity_of(manifest), "rows": str(rows)} or not manifest["shapes"].keys() <= names:
        return "belongs to another cache"
    return None if wrong is None else f"is damaged (tensor {wrong!r} is missing or has another shape or type)"


def _misshapen(shard: Any, names: set[str], rows: int, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The first tensor of a shard from which its rows cannot be taken, or None; texts and conditions alike."""
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


def refuse_stale(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `WadiError` that names what differs, unless the cache's encoder is the one ``expected``."""
    names = {*found, *expected}
    if DIGEST not in found or DIGEST not in expected:  # caches of earlier versions, and encoders that are not of files
        names.discard(DIGEST)
    different = [name for name in sorted(names) if found.get(name) != expected.get(name)]
    if different:
        told = "; ".join(f"{name}: {found.get(name)!r} in the cache, {expected.get(name)!r} here" for name in different)
        raise WadiError(
            f"Embedding cache {str(folder)!r} was made by another encoder or with other settings. Different: {told}. "
            "Expected the same: make a new cache with `wadi embed`, or give the teacher it was made with."
        )


class Embeddings(Sequence[str]):
    """A complete cache, read row by row; as a sequence it is the prompts' texts.

    Attributes:
        encoder: what encoded it.
        digest: hash of its prompts.
    Raises:
        WadiError: if a shard is missing, damaged or of another cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.encoder: dict[str, Any] = self.manifest["encoder"]
        self.digest: str = self.manifest["prompts"]
        for number in range(_shards(self.manifest)):
            if (trouble := _trouble(self.folder, number, self.manifest)) is not None:
                raise WadiError(
                    f"Embedding cache {str(self.folder)!r} is not complete: {shard_path(self.folder, number).name} {trouble}. "
                    "Expected all of it: run the same `wadi embed` again, which makes what is missing."
                )
        self._shard = lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self._place(range(len(self))[int(index)])
        return bytes(self._part(shard, "text", row).numpy()).decode()

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of a condition for these prompts, ``(len(indices), ...)`` each, as the encoder gave them."""
        return {name: torch.stack([self._row(name, int(i)) for i in indices]) for name in self.manifest["shapes"]}

    def _row(self, name: str, index: int) -> Tensor:
        shard, row = self._place(index)
        if f"{name}.starts" not in shard.keys():  # noqa: SIM118  (safetensors' handle is no dictionary)
            value: Tensor = shard.get_slice(name)[row]
            return value
        part = self._part(shard, name, row)
        return torch.cat([part, part.new_zeros(self.manifest["shapes"][name][0] - len(part), *part.shape[1:])])

    @staticmethod
    def _part(shard: Any, name: str, row: int) -> Tensor:
        start, end = shard.get_slice(f"{name}.starts")[row : row + 2].tolist()
        part: Tensor = shard.get_slice(name)[start:end]
        return part

    def _place(self, index: int) -> tuple[Any, int]:
        number, row = divmod(index, self.manifest["shard_rows"])
        return self._shard(number), row

    def _open(self, number: int) -> Any:
        from safetensors import safe_open

        return safe_open(regular(shard_path(self.folder, number)), "pt").__enter__()
