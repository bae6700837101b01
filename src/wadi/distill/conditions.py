"""The conditions of training prompts: encoded when a step needs them, or read from a cache that ``wadi embed`` wrote."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.backbones.digest import loaded_digest
from wadi.distill.state import fingerprint
from wadi.errors import WadiError
from wadi.prompts import cache
from wadi.prompts.cache import Embeddings
from wadi.prompts.reading import Prompts, open_prompts
from wadi.zoo.paths import NAME as ZOO


@dataclass
class Conditions:
    """The conditions of ``prompts``, by row number. They come from the cache if there is one, else from the text encoder."""

    backbone: Backbone
    prompts: Prompts | Embeddings

    def __call__(self, rows: Tensor | Sequence[int]) -> Condition:
        """Return the condition of these rows, ``len(rows)`` rows on the network's device."""
        numbers = [int(row) for row in rows]
        if isinstance(self.prompts, Embeddings):
            return Condition(self.prompts.rows(numbers)).to(self.backbone.device)
        return self.backbone.encode([self.prompts[number] for number in numbers])


def open_prompts_or_cache(source: str, field: str | None) -> Prompts | Embeddings:
    """Open the cache at ``source`` if it is the folder of one, else the prompts.

    Args:
        field: field that holds the prompt, see `DistillConfig.prompts_field`; None for a cache.
    Raises:
        WadiError: if ``source`` does not exist or cannot be read, or ``field`` is given for a cache.
    """
    if source == ZOO or not cache.is_cache(source):
        return open_prompts(source, field)
    if field is not None:
        raise WadiError(f"prompts_field is {field!r}, but {source!r} is an embedding cache. Leave out --prompts-field.")
    return Embeddings(source)


def conditions_of(backbone: Backbone, prompts: Prompts | Embeddings) -> Conditions:
    """Return the conditions of ``prompts``. A cache must come from this backbone's encoder.

    Raises:
        WadiError: if another encoder wrote the cache, or the same one with other settings.
    """
    if isinstance(prompts, Embeddings):
        cache.check_encoder(prompts.folder, prompts.encoder, encoder_identity(backbone))
    return Conditions(backbone, prompts)


def encoder_identity(backbone: Backbone) -> dict[str, Any]:
    """Return everything that determines the condition of a prompt: family, weights, dtypes, tokenizers, arguments, and the
    resolution if the condition contains it.
    """
    parts = {
        name: part
        for name, part in backbone.pipeline.components.items()
        if part is not None and name.startswith(("text_encoder", "tokenizer"))
    }
    identity: dict[str, Any] = {"family": type(backbone).__name__, "arguments": backbone.encode_defaults()}
    if backbone.condition_has_size:
        identity["resolution"] = list(backbone.resolution)
    for name in sorted(parts):
        if name.startswith("text_encoder"):
            identity[name] = f"{fingerprint(parts[name])} {str(parts[name].dtype).removeprefix('torch.')}"
        else:
            vocabulary = json.dumps(sorted(parts[name].get_vocab().items()))
            digest = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
            identity[name] = f"{digest} {parts[name].model_max_length}"
    if (files_digest := loaded_digest(backbone.pipeline, set(parts))) is not None:
        identity[cache.DIGEST] = files_digest
    return identity


def free_encoders(backbone: Backbone) -> None:
    """Release the memory of the text encoders. `Backbone.encode` cannot be called afterwards."""
    for name in backbone.pipeline.components:
        if name.startswith("text_encoder"):
            setattr(backbone.pipeline, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
