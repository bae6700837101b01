"""One answer to "is it the same teacher?": a digest of everything a pipeline is made of, by the files that are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wadi.backbones.base import RESOLUTION
from wadi.backbones.loading import pipeline_index
from wadi.backbones.stored import components, names_in, pipeline_folder, pipeline_weights, split_variant
from wadi.io.digests import digests
from wadi.io.files import JUNK
from wadi.io.records import read_json
from wadi.io.regular import exists

# Settings of a config that say who wrote it, not how the model computes.
COSMETIC = ("transformers_version", "dtype", "torch_dtype", "architectures")


def teacher_digest(path: str | Path, variant: str | None = None) -> str:
    """Return a digest of a pipeline: weights, configs, tokenizers and schedule; the same wherever its folder lies.

    Args:
        path: folder or Hub id.
        variant: which copy of the weights; see `wadi.backbones.loading.load_pipeline`.
    Raises:
        WadiError: if it is no pipeline, or a file is missing.
    """
    path, named = split_variant(path)
    variant = variant or named
    return _of(pipeline_folder(path, variant), variant)


def loaded_digest(pipeline: Any, of: Collection[str] | None = None) -> str | None:
    """Return the digest of a pipeline that `load_pipeline` loaded; None of one that was made in another way.

    Args:
        of: names of components; None = all of them.
    """
    source = getattr(pipeline, "wadi_source", None)
    return None if source is None or not exists(source[0]) else _of(source[0], source[1], of)


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a digest of all values of ``tensors``, as float32, with their names and shapes, and of ``text``."""
    total = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _of(folder: Path, variant: str | None, chosen: Collection[str] | None = None) -> str:
    index = pipeline_index(folder)
    weights = pipeline_weights(folder, index, variant)
    names = [component for component in sorted(components(index)) if chosen is None or component in chosen]
    files = {
        name: [*weights[name].files, folder / name / "config.json"] if name in weights else _files(folder / name)
        for name in names
    }
    large = [file for name in names for file in files[name] if not _is_config(file)]
    known = dict(zip(large, digests(large), strict=True))
    total = hashlib.sha256(json.dumps([index["_class_name"], index.get(RESOLUTION)]).encode())
    for name in names:
        for file in files[name]:
            total.update(f"{name}/{file.name} {known.get(file) or _settings(file)}\n".encode())
    return total.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files of a tokenizer or scheduler, without what file managers and editors leave there."""
    return [folder / name for name in names_in(folder) if not name.startswith(".") and name not in JUNK]


def _is_config(file: Path) -> bool:
    return file.name in ("config.json", "scheduler_config.json")


def _settings(file: Path) -> str:
    """The settings of a config that matter, in one order."""
    values = read_json(file, dict[str, Any], "Config")
    kept = {k: v for k, v in values.items() if k not in COSMETIC and (not k.startswith("_") or k == "_class_name")}
    return json.dumps(kept, sort_keys=True)
