"""A cache of features, by the content of images: no network sees the same image twice, whatever its file is called.

There is a folder for each network, filter (`Extractor.protocol`), kind of device and set of library versions. It contains
shards with ``keys (n, 32)`` (SHA-256 of an image's size and bytes) and ``features (n, dim)``. Each shard is written completely
under a name of its own, so several processes can fill one cache at once.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError, first_line
from wadi.io.files import write_whole
from wadi.io.regular import require_file
from wadi.io.user_cache import cache_folder
from wadi.io.versions import installed_versions
from wadi.metrics.checks import Images, as_bytes
from wadi.metrics.features import Extractor

SHARD = 4096  # images per file
LIBRARIES = ("torch", "transformers", "pillow", "numpy")  # other versions may change the last digits of features


def image_key(image: Tensor) -> bytes:
    """Return the SHA-256 of a uint8 image ``(3, h, w)``: of its size and its bytes."""
    shape = str(tuple(image.shape)).encode()
    return hashlib.sha256(shape + image.cpu().contiguous().numpy().tobytes()).digest()


class FeatureCache:
    """An extractor with a memory. Call it with images, as you would call the extractor.

    New features stay in memory until `flush`, the end of a ``with`` block, or ``shard`` new images. An interrupted run loses
    at most the last shard. ``hits`` and ``misses`` count images.

    Args:
        folder: of all caches; None = ``features`` in the user's cache folder.
        shard: images in a file.
    Raises:
        WadiError: if a shard cannot be read or the folder cannot be written.
    """

    def __init__(self, extractor: Extractor, folder: Path | None = None, shard: int = SHARD) -> None:
        self.extractor = extractor
        about = {
            **extractor.protocol(),
            "libraries": installed_versions(LIBRARIES),
            "device": torch.device(extractor.device).type,
        }
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = (folder or cache_folder() / "features") / f"{extractor.name.replace(' ', '-').replace('/', '-')}-{name}"
        self.shard = shard
        self.hits = self.misses = 0
        self._stored: dict[bytes, tuple[Any, int]] = {}  # opened shard and row
        self._fresh: dict[bytes, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._open(file)

    def __call__(self, images: Images) -> Tensor:
        images = as_bytes(images)
        keys = [image_key(image) for image in images]
        absent = {k: p for k, p in zip(keys, images, strict=True) if k not in self._stored and k not in self._fresh}
        if absent:
            self._fresh.update(zip(absent, self.extractor(list(absent.values())), strict=True))
        self.misses += len(absent)
        self.hits += len(keys) - len(absent)
        features = torch.stack([self._row(k) for k in keys]) if keys else torch.empty(0, self.extractor.dim)
        if len(self._fresh) >= self.shard:
            self.flush()
        return features

    def _row(self, k: bytes) -> Tensor:
        if k in self._fresh:
            return self._fresh[k]
        opened, row = self._stored[k]
        return opened.get_slice("features")[row : row + 1][0]

    def _open(self, file: Path) -> None:
        """Read the keys of a shard. Its features stay on disk until they are needed."""
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(require_file(file), framework="pt")
            keys, shape = opened.get_tensor("keys"), opened.get_slice("features").get_shape()
        except (OSError, SafetensorError) as error:
            raise WadiError(
                f"Cached features {str(file)!r} cannot be read ({first_line(error)}). Delete the file: its features "
                "are then computed again."
            ) from error
        if keys.shape != (len(keys), 32) or shape != [len(keys), self.extractor.dim]:
            raise WadiError(
                f"Cached features {str(file)!r} have keys of shape {tuple(keys.shape)} and features of {tuple(shape)}. "
                f"They must have (n, 32) and (n, {self.extractor.dim}): delete the file."
            )
        self._stored.update((k.numpy().tobytes(), (opened, row)) for row, k in enumerate(keys))

    def flush(self) -> None:
        """Write the new features to a shard."""
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
