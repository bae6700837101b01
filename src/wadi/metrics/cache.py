"""Features remembered by content: the same picture through the same network is not computed twice, whatever its name.

A folder per network, filter (`Extractor.protocol`), kind of device and versions of libraries, in it shards of ``keys (n, 32)``
(SHA-256 of an image's size and bytes) and ``features (n, dim)``. Each shard is written whole under a name of its own, so
processes that fill one cache at once do not disturb each other.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.digests import cache_folder
from wadi.io.files import write_whole
from wadi.io.regular import regular
from wadi.io.versions import versions
from wadi.metrics.checks import Images, as_bytes
from wadi.metrics.features import Extractor

SHARD = 4096  # images per file
LIBRARIES = ("torch", "transformers", "pillow", "numpy")  # by whose version features may differ in the last digits


def key(picture: Tensor) -> bytes:
    """SHA-256 of a uint8 picture ``(3, h, w)``: of its size and its bytes."""
    shape = str(tuple(picture.shape)).encode()
    return hashlib.sha256(shape + picture.cpu().contiguous().numpy().tobytes()).digest()


class FeatureCache:
    """An extractor that remembers: call it with images as the extractor itself.

    What is new is kept in memory until ``flush`` or the end of a ``with`` block, and at every ``shard`` images; an interrupted
    run loses at most the last shard. ``hits`` and ``misses`` count images.

    Args:
        folder: of all caches; None = ``features`` in the user's cache folder.
    Raises:
        WadiError: if a shard cannot be read or the folder cannot be written.
    """

    def __init__(self, extractor: Extractor, folder: Path | None = None, shard: int = SHARD) -> None:
        self.extractor = extractor
        about = {**extractor.protocol(), "libraries": versions(LIBRARIES), "device": torch.device(extractor.device).type}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = (folder or cache_folder() / "features") / f"{extractor.name.replace(' ', '-').replace('/', '-')}-{name}"
        self.shard = shard
        self.hits = self.misses = 0
        self._stored: dict[bytes, tuple[Any, int]] = {}  # opened shard and row
        self._fresh: dict[bytes, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._open(file)

    def __call__(self, images: Images) -> Tensor:
        pictures = as_bytes(images)
        keys = [key(picture) for picture in pictures]
        absent = {k: p for k, p in zip(keys, pictures, strict=True) if k not in self._stored and k not in self._fresh}
        if absent:
            self._fresh.update(zip(absent, self.extractor(list(absent.values())), strict=True))
        self.misses += len(absent)
        self.hits += len(keys) - len(absent)
        found = torch.stack([self._row(k) for k in keys]) if keys else torch.empty(0, self.extractor.dim)
        if len(self._fresh) >= self.shard:
            self.flush()
        return found

    def _row(self, k: bytes) -> Tensor:
        if k in self._fresh:
            return self._fresh[k]
        opened, row = self._stored[k]
        return opened.get_slice("features")[row : row + 1][0]

    def _open(self, file: Path) -> None:
        """Take a shard's keys; its features stay on disk until asked for."""
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(regular(file), framework="pt")
            keys, shape = opened.get_tensor("keys"), opened.get_slice("features").get_shape()
        except (OSError, SafetensorError) as error:
            raise WadiError(
                f"Cached features {str(file)!r} cannot be read ({str(error).splitlines()[0]}). Expected a file that this "
                "package wrote: delete it, and its features are computed anew."
            ) from error
        if keys.shape != (len(keys), 32) or shape != [len(keys), self.extractor.dim]:
            raise WadiError(
                f"Cached features {str(file)!r} have keys of shape {tuple(keys.shape)} and features of {tuple(shape)}. "
                f"Expected (n, 32) and (n, {self.extractor.dim}): delete the file."
            )
        self._stored.update((k.numpy().tobytes(), (opened, row)) for row, k in enumerate(keys))

    def flush(self) -> None:
        """Write what is new."""
        if not self._fresh:
            return
        from safetensors.torch import save

        keys = b"".join(self._fresh)
        tensors = {
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 32),
            "features": torch.stack(list(self._fresh.values())),
        }
        file = self.folder / f"{hashlib.sha256(keys).hexdigest()[:20]}.safetensors"
        write_whole(file, save(tensors, {"extractor": json.dumps(self.extractor.protocol())}))
        self._fresh = {}
        self._open(file)

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()
