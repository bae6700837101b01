"""Encode all prompts once and write their conditions to a cache, for ``wadi embed``. Training then needs no text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wadi.backbones import Backbone, Condition
from wadi.distill.conditions import encoder_identity
from wadi.errors import WadiError
from wadi.io.progress import progress
from wadi.prompts import cache
from wadi.prompts.reading import Prompts

SHARD_ROWS = 1024  # 240 MB of Stable Diffusion's embeddings in float32


def embed_prompts(backbone: Backbone, prompts: Prompts, out: Path, batch: int = 16, shard_rows: int = SHARD_ROWS) -> Path:
    """Encode ``prompts`` into a cache at ``out``, and return ``out``. Repeat an interrupted call: complete shards are kept.

    Args:
        batch: number of prompts encoded at once.
        shard_rows: number of prompts in each file of the cache.
    Raises:
        WadiError: if ``out`` contains other files, or a cache of other prompts or of another encoder; if the disk is full.
    """
    if batch < 1 or shard_rows < 1:
        raise WadiError(f"--batch is {batch} and --shard-rows is {shard_rows}. Both must be at least 1.")
    manifest = _open_cache(backbone, prompts, out, shard_rows)
    missing = cache.missing_shards(out, manifest)
    rows = {n: range(n * shard_rows, min((n + 1) * shard_rows, len(prompts))) for n in missing}
    done = len(prompts) - sum(map(len, rows.values()))
    with progress("prompts encoded", len(prompts), done) as bar:
        for number, shard in rows.items():
            parts = []
            for start in range(shard.start, shard.stop, batch):
                texts = prompts[start : min(start + batch, shard.stop)]
                parts.append(backbone.encode(texts).to("cpu"))
                bar.advance(by=len(texts))
            path, identity = cache.shard_path(out, number), cache.cache_identity(manifest)
            cache.write_shard(path, prompts[shard.start : shard.stop], Condition.cat(parts).tensors, identity)
    return out


def _open_cache(backbone: Backbone, prompts: Prompts, out: Path, shard_rows: int) -> dict[str, Any]:
    """Return the manifest of the cache at ``out``, written now if the cache is new.

    Raises:
        WadiError: if ``out`` contains other files, or a cache of other prompts or of another encoder.
    """
    row = backbone.encode([prompts[0]])
    manifest: dict[str, Any] = {
        "encoder": encoder_identity(backbone),
        "prompts": prompts.digest,
        "count": len(prompts),
        "shard_rows": shard_rows,
        "shapes": {name: list(value.shape[1:]) for name, value in row.tensors.items()},
    }
    if cache.is_cache(out):
        existing = cache.read_manifest(out)
        cache.check_encoder(out, existing["encoder"], manifest["encoder"])
        manifest["encoder"] = existing["encoder"]  # every shard repeats it; caches of earlier versions have no digest of files
        different = [name for name in manifest if existing[name] != manifest[name]]
        if different:
            raise WadiError(
                f"Embedding cache {str(out)!r} has other prompts or another layout. Different: {', '.join(different)}. Repeat "
                "the command that started it, or choose another --out."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WadiError(f"--out {str(out)!r} exists and is not an embedding cache. Choose a new or empty folder.")
    else:
        cache.write_manifest(out, manifest)
    return manifest
