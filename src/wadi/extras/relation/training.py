"""Relation inversion: learn a token from exemplars that share a relation (ReVersion, arXiv 2303.13495).

The teacher stays frozen. Only the token's embedding ``R`` is learned, by

    L = L_denoise + lambda L_steer:

the denoising loss of the exemplars under their descriptions ("fox <R> pizza") at timesteps from relation-focal sampling, and
the steering loss (see `wadi.extras.relation.loss`). A student of the teacher reads text with the same encoder, so the token
works there too, in one step: see `wadi.extras.relation.token_file.add_token`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.backbones import check_not_distilled, from_pipeline
from wadi.errors import WadiError
from wadi.extras.relation.config import RelationConfig
from wadi.extras.relation.exemplars import Exemplars, read_exemplars
from wadi.extras.relation.loop import TokenTraining
from wadi.extras.relation.loss import PREPOSITIONS
from wadi.extras.relation.state import finish_state, resume_state
from wadi.extras.relation.token_file import write_token
from wadi.extras.relation.vocabulary import (
    check_new_token,
    embeddings_of,
    first_single_token,
    insert_token,
    replaced_embeddings,
    text_encoders,
)
from wadi.io import outputs


@dataclass(frozen=True)
class LearnedToken:
    """Result of a training.

    Attributes:
        loss_before, loss_after: denoising loss on the same noise and timesteps.
        seconds: time of the training.
        nearest: vocabulary entries whose embeddings in the first text encoder are nearest to the token's, by cosine.
    """

    path: Path
    loss_before: float
    loss_after: float
    seconds: float
    nearest: list[str]


def learn_token(
    pipeline: Any, exemplars: Path, token: str, init: str | None, out: Path, config: RelationConfig | None = None
) -> LearnedToken:
    """Learn ``token`` from the folder ``exemplars`` and write it to ``out``. The same call continues an interrupted one.

    Args:
        pipeline: the many-step teacher; it has the learned token afterwards.
        init: the word whose embedding the token starts from; None = 'and', as in ReVersion, or the first preposition that is
            one token of the teacher's vocabulary.
        out: ``.safetensors`` file in diffusers' textual-inversion format. A ``.jsonl`` file next to it receives the statistics.
    Raises:
        WadiError: if the teacher has other text encoders than CLIP or is itself distilled, the token exists, the exemplars or
            settings are wrong, or the gradient stays infinite.
    """
    config = config or RelationConfig()
    check_token_path(out)
    check_new_token(pipeline, token)
    init = first_single_token(pipeline, ("and", *PREPOSITIONS)) if init is None else init
    rows = embeddings_of(pipeline, init)
    backbone = from_pipeline(pipeline)
    check_not_distilled(pipeline, backbone.network)
    if backbone.network.dtype == torch.float16:
        raise WadiError("The teacher is in float16, in which gradients vanish. Use float32 or bfloat16.")
    examples = read_exemplars(exemplars, token, backbone.resolution)
    insert_token(pipeline, token, rows)
    encoders = text_encoders(pipeline)
    _check_length(pipeline, token, examples)
    for module in (backbone.network, *(encoder.model for encoder in encoders)):
        module.requires_grad_(False).eval()
    x0 = backbone.encode_images(examples.images, batch=16)
    job = _job_digest(config, token, examples, x0, rows)
    training = TokenTraining(backbone, config, token, examples, x0, rows)
    resume_state(out, training.state, job, (training.network, training.earlier_network))
    start = time.monotonic()
    with replaced_embeddings(pipeline, token, training.state.rows):
        loss_before = training.evaluate(rows)
        training.train(out, job)
        loss_after = training.evaluate(training.state.rows)
    learned = [row.detach() for row in training.state.rows]
    for encoder, row in zip(encoders, learned, strict=True):
        encoder.table[encoder.id_of(token)] = row.to(encoder.table)
    write_token(out, token, learned, {"init": init, "steps": str(config.steps), "seed": str(config.seed)})
    finish_state(out, training.state)
    nearest = encoders[0].nearest_words(learned[0], token)
    return LearnedToken(out, loss_before, loss_after, time.monotonic() - start, nearest)


def check_token_path(out: Path) -> None:
    """Raise `WadiError` unless ``out`` ends in .safetensors and a new file can be written there."""
    outputs.check_out(out, folder=False)
    outputs.check_writable(out, (".safetensors",))


def _check_length(pipeline: Any, token: str, exemplars: Exemplars) -> None:
    """Raise `WadiError` if a sentence is so long that the tokenizer cuts it before the token."""
    for encoder in text_encoders(pipeline):
        number = encoder.id_of(token)
        for sentence in (s for sentences in exemplars.sentences for s in sentences):
            if number not in encoder.tokenizer(sentence, truncation=True).input_ids:
                raise WadiError(
                    f"The teacher does not read {token} in {sentence[:80]!r}: it cuts a text after "
                    f"{encoder.tokenizer.model_max_length} tokens. Write shorter descriptions, with the token between spaces."
                )


def _job_digest(config: RelationConfig, token: str, exemplars: Exemplars, x0: Tensor, rows: Sequence[Tensor]) -> str:
    """Return a digest of everything that affects the result, except the number of steps."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("steps", "save_every")}
    digest = hashlib.sha256(json.dumps([settings, token, exemplars.sentences]).encode())
    for tensor in (x0, *rows):
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
