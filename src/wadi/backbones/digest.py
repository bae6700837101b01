"""Compute a digest of a pipeline, from the files that are loaded. Two runs have the same teacher if the digests are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.backbones.base import RESOLUTION
from wadi.backbones.configs import pipeline_index
from wadi.backbones.hub import pipeline_folder
from wadi.backbones.weight_files import components, file_names, pipeline_weights, split_variant
from wadi.io.digest_cache import cached_sha256
from wadi.io.outputs import JUNK
from wadi.io.records import read_json
from wadi.io.regular import exists

# Settings of a config that say how it was written, not how the model computes.
COSMETIC = ("transformers_version", "dtype", "torch_dtype", "architectures")


def teacher_digest(path: str | Path, variant: str | None = None) -> str:
    """Return a digest of a pipeline's weights, configs, tokenizers and schedule. It does not depend on the folder's place.

    Args:
        path: folder or Hub id.
        variant: which copy of the weights; see `wadi.backbones.loading.load_pipeline`.
    Raises:
        WadiError: if it is not a pipeline, or a file is missing.
    """
    path, named = split_variant(path)
    variant = variant or named
    return _folder_digest(pipeline_folder(path, variant), variant)


def loaded_digest(pipeline: Any, of: Collection[str] | None = None) -> str | None:
    """Return the digest of a pipeline that `load_pipeline` loaded; None if it was built in another way.

    Args:
        of: names of the components to include; None = all of them.
    """
    source = getattr(pipeline, "wadi_source", None)
    return None if source is None or not exists(source[0]) else _folder_digest(source[0], source[1], of)


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a digest of the values of ``tensors`` as float32, their names and shapes, and ``text``."""
    total = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _folder_digest(folder: Path, variant: str | None, included: Collection[str] | None = None) -> str:
    index = pipeline_index(folder)
    weights = pipeline_weights(folder, index, variant)
    names = [component for component in sorted(components(index)) if included is None or component in included]
    files = {
        name: [*weights[name].files, folder / name / "config.json"] if name in weights else _small_files(folder / name)
        for name in names
    }
    large = [file for name in names for file in files[name] if not _is_config(file)]
    digests = dict(zip(large, cached_sha256(large), strict=True))
    total = hashlib.sha256(json.dumps([index["_class_name"], index.get(RESOLUTION)]).encode())
    for name in names:
        for file in files[name]:
            total.update(f"{name}/{file.name} {digests.get(file) or _settings(file)}\n".encode())
    return total.hexdigest()


def _small_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer or scheduler, without those that file managers and editors create."""
    return [folder / name for name in file_names(folder) if not name.startswith(".") and name not in JUNK]


def _is_config(file: Path) -> bool:
    return file.name in ("config.json", "scheduler_config.json")


def _settings(file: Path) -> str:
    """Return the settings of a config that affect the model, in a fixed order."""
    values = read_json(file, dict[str, Any], "Config")
    settings = {k: v for k, v in values.items() if k not in COSMETIC and (not k.startswith("_") or k == "_class_name")}
    return json.dumps(settings, sort_keys=True)
