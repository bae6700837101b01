"""Conditions of prompts by their rows: encoded batch by batch as they are drawn, or once before, by ``wadi embed``."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.backbones.digest import loaded_digest
from wadi.distill.state import fingerprint
from wadi.errors import WadiError
from wadi.io.progress import progress
from wadi.prompts import cache
from wadi.prompts.cache import Embeddings
from wadi.prompts.reading import Prompts, open_prompts
from wadi.zoo.paths import NAME as ZOO

SHARD_ROWS = 1024  # 240 MB of Stable Diffusion's embeddings in float32


def encoder_of(backbone: Backbone) -> dict[str, Any]:
    """What decides about a prompt's condition: weights, tokenizers, dtype, and settings of the family."""
    parts = backbone.pipeline.components
    known: dict[str, Any] = {"family": type(backbone).__name__, "resolution": list(backbone.resolution)}
    for name in sorted(parts):
        if parts[name] is None:
            continue
        if name.startswith("text_encoder"):
            known[name] = f"{fingerprint(parts[name])} {str(parts[name].dtype).removeprefix('torch.')}"
        elif name.startswith("tokenizer"):
            words = json.dumps(sorted(parts[name].get_vocab().items()))
            known[name] = f"{hashlib.sha256(words.encode()).hexdigest()[:16]} {parts[name].model_max_length}"
    own = {name for name in parts if name.startswith(("text_encoder", "tokenizer")) and parts[name] is not None}
    if (digest := loaded_digest(backbone.pipeline, own)) is not None:
        known[cache.DIGEST] = digest
    return known


@dataclass
class Conditions:
    """Conditions of ``prompts`` by row; from a cache if ``prompts`` is one, else from the backbone's encoder."""

    backbone: Backbone
    prompts: Prompts | Embeddings

    def __call__(self, rows: Tensor | Sequence[int]) -> Condition:
        """Condition of ``len(rows)`` rows, on the network's device."""
        numbers = [int(row) for row in rows]
        if isinstance(self.prompts, Embeddings):
            return Condition(self.prompts.rows(numbers)).to(self.backbone.device)
        return self.backbone.encode([self.prompts[number] for number in numbers])


def open_source(source: str, field: str | None) -> Prompts | Embeddings:
    """Prompts to be encoded, or a cache of them if ``source`` is the folder of one.

    Raises:
        WadiError: if there is none, or it cannot be read.
    """
    if source == ZOO or not cache.is_cache(source):
        return open_prompts(source, field)
    if field is not None:
        raise WadiError(f"prompts_field is {field!r}, and {source!r} is an embedding cache. Leave out --prompts_field.")
    return Embeddings(source)


def conditions_of(backbone: Backbone, prompts: Prompts | Embeddings) -> Conditions:
    """`Conditions`, after a look at whether a cache is of this backbone's encoder.

    Raises:
        WadiError: if it is of another, or was made with other settings.
    """
    if isinstance(prompts, Embeddings):
        cache.check_encoder(prompts.folder, prompts.encoder, encoder_of(backbone))
    return Conditions(backbone, prompts)


def free_encoders(backbone: Backbone) -> None:
    """Let go of the text encoders: a cache serves. `Backbone.encode` cannot be called afterwards."""
    for name in backbone.pipeline.components:
        if name.startswith("text_encoder"):
            setattr(backbone.pipeline, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def embed(backbone: Backbone, prompts: Prompts, out: Path, batch: int = 16, shard_rows: int = SHARD_ROWS) -> Path:
    """Encode ``prompts`` into a cache at ``out``; shards that are there already are kept, so that it can be interrupted.

    Args:
        batch: prompts encoded at once.
    Raises:
        WadiError: if ``out`` is something else, or a cache of other prompts or of another encoder; if the disk is full.
    """
    if batch < 1 or shard_rows < 1:
        raise WadiError(f"--batch is {batch} and --shard_rows is {shard_rows}. Expected both at least 1.")
    first = backbone.encode([prompts[0]])
    manifest: dict[str, Any] = {
        "encoder": encoder_of(backbone),
        "prompts": prompts.digest,
        "count": len(prompts),
        "shard_rows": shard_rows,
        "shapes": {name: list(value.shape[1:]) for name, value in first.tensors.items()},
    }
    if cache.is_cache(out):
        found = cache.read_manifest(out)
        cache.check_encoder(out, found["encoder"], manifest["encoder"])
        manifest["encoder"] = found["encoder"]  # each shard names it; an earlier version's has no digest of files
        other = [name for name in manifest if found[name] != manifest[name]]
        if other:
            raise WadiError(
                f"Embedding cache {str(out)!r} is of other prompts or another layout ({', '.join(other)} differ). Expected the "
                "same command as before, or another --out."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WadiError(f"--out {str(out)!r} exists and is no embedding cache. Expected a new or empty folder: choose another.")
    else:
        cache.write_manifest(out, manifest)
    missing = cache.missing_shards(out, manifest)
    rows = {n: range(n * shard_rows, min((n + 1) * shard_rows, len(prompts))) for n in missing}
    done = len(prompts) - sum(map(len, rows.values()))
    with progress("prompts encoded", len(prompts), done) as bar:
        for number, chosen in rows.items():
            parts = []
            for start in range(chosen.start, chosen.stop, batch):
                texts = prompts[start : min(start + batch, chosen.stop)]
                parts.append(backbone.encode(texts).to("cpu"))
                bar.advance(by=len(texts))
            identity = cache.cache_identity(manifest)
            path = cache.shard_path(out, number)
            cache.write_shard(path, prompts[chosen.start : chosen.stop], Condition.cat(parts).tensors, identity)
    return out
