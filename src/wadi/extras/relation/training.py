"""Relation inversion: from exemplars that share a relation to a token that means it (ReVersion, arXiv 2303.13495).

The teacher stays frozen; what is learned is one embedding ``R``, by

    L = L_denoise + lambda L_steer,

the denoising loss of the exemplars under their descriptions ("fox <R> pizza") at timesteps drawn by relation-focal sampling,
and the steering loss (both in `wadi.extras.relation.loss`). A student distilled from the teacher reads text by the same
encoder, so the token works there as it is, in one step: `add_token`.
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
import torch.nn.functional as F
from torch import Tensor

from wadi.backbones import Backbone, Condition, check_not_distilled, from_pipeline
from wadi.backbones.digest import tensors_digest
from wadi.distill.checkpoints import fingerprint
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.run_folder import stop_on_signals
from wadi.errors import WadiError
from wadi.extras.relation import state as states
from wadi.extras.relation.data import Exemplars, read_exemplars
from wadi.extras.relation.loss import NEUTRAL, PREPOSITIONS, focal_density, focal_timesteps, steering_loss
from wadi.extras.relation.token import (
    Tower,
    add_token,
    check_new,
    first_rows,
    first_word,
    insert,
    learning,
    read_token,
    towers,
    write_token,
)
from wadi.io import bounds, outputs
from wadi.io.progress import progress

__all__ = ["InversionConfig", "Learned", "add_token", "encode", "invert_relation", "read_token"]

BAD_STEPS = 10  # steps without a finite gradient before giving up
HELD = 64  # (exemplar, noise, timestep) triples that judge a token before and after


_LIMITS: dict[str, bounds.Whole | bounds.Number] = {
    "steps": bounds.UPDATES, "batch": bounds.BATCH, "positives": bounds.COUNT, "save_every": bounds.UPDATES, "lr": bounds.RATE,
    "temperature": bounds.Number(0, 1000, above=True), "alpha": bounds.SHARE, "steer": bounds.Number(0, 1000),
    "seed": bounds.SEED,
}  # fmt: skip


@dataclass(frozen=True)
class InversionConfig:
    """Settings of an inversion; the defaults are ReVersion's."""

    steps: int = 3000  # updates of the embedding
    batch: int = 8  # exemplars an update
    lr: float = 2e-3  # of Adam
    alpha: float = 0.5  # skew of the timesteps to the noisy end: 0 none, 1 most
    steer: float = 0.01  # weight of the steering loss; 0 = none
    temperature: float = 0.07  # of the steering loss
    positives: int = 4  # prepositions drawn for each update
    words: tuple[str, ...] = PREPOSITIONS  # what they are drawn from
    seed: int = 0
    save_every: int = 100  # updates between states that a later run goes on from

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))


@dataclass(frozen=True)
class Learned:
    """What came of an inversion: denoising loss on the same fixed noise before and after, and its time."""

    path: Path
    loss_before: float
    loss_after: float
    seconds: float
    nearest: list[str]  # words whose embeddings lie nearest to the token's, by cosine, of the first encoder


@dataclass(frozen=True)
class _Steering:
    """Token ids for one encoder: what pulls, and for each exemplar what pushes."""

    pull: Tensor
    push: list[Tensor]


def invert_relation(
    pipeline: Any, exemplars: Path, token: str, init: str | None, out: Path, config: InversionConfig | None = None
) -> Learned:
    """Learn ``token`` from the folder ``exemplars`` on ``pipeline``, the many-step teacher, and write it to ``out``.

    The same call again goes on with one that was interrupted. ``pipeline`` has the learned token afterwards.

    Args:
        init: the word whose embedding the token starts from; None = 'and', as in ReVersion, or the first preposition that is
            one token of the teacher's vocabulary.
        out: ``.safetensors`` file in diffusers' textual-inversion format; figures go beside it as ``.jsonl``.
    Raises:
        WadiError: on a teacher that does not read by CLIP or is itself distilled, a token that exists, exemplars or settings
            that are not right, or a loss that stays infinite.
    """
    config = config or InversionConfig()
    check_out(out)
    check_new(pipeline, token)
    init = first_word(pipeline, ("and", *PREPOSITIONS)) if init is None else init
    rows = first_rows(pipeline, init)
    backbone = from_pipeline(pipeline)
    check_not_distilled(pipeline, backbone.network)
    if backbone.network.dtype == torch.float16:
        raise WadiError("The teacher is in float16, in which gradients vanish. Expected float32 or bfloat16.")
    found = read_exemplars(exemplars, token, backbone.resolution)
    insert(pipeline, token, rows)
    _check_length(pipeline, token, found)
    for module in (backbone.network, *(tower.encoder for tower in towers(pipeline))):
        module.requires_grad_(False).eval()
    x0 = backbone.encode_images(found.pictures, batch=16)
    job = _job(config, token, found, x0, rows)
    learn = _Inversion(backbone, config, token, found, x0, rows)
    states.resume(out, learn.state, job, (learn.network, learn.earlier))
    start = time.monotonic()
    with learning(pipeline, token, learn.state.rows):
        before = learn.held(rows)
        learn.run(out, job)
        after = learn.held(learn.state.rows)
    learned = [row.detach() for row in learn.state.rows]
    for tower, row in zip(towers(pipeline), learned, strict=True):
        tower.table[tower.tokenizer.convert_tokens_to_ids(token)] = row.to(tower.table)
    about = {"init": init, "steps": str(config.steps), "seed": str(config.seed)}
    write_token(out, token, learned, about)
    states.finish(out, learn.state)
    return Learned(out, before, after, time.monotonic() - start, nearest(towers(pipeline)[0], learned[0], token))


def check_out(out: Path) -> None:
    """Raise `WadiError` unless a new file can be written at ``out``, and its name ends in .safetensors."""
    outputs.check_out(out, folder=False)
    outputs.check_writable(out, (".safetensors",))


def _check_length(pipeline: Any, token: str, exemplars: Exemplars) -> None:
    """Raise if a sentence is so long that the tokenizer cuts it before the token."""
    for tower in towers(pipeline):
        number = tower.tokenizer.convert_tokens_to_ids(token)
        for sentence in (s for sentences in exemplars.sentences for s in sentences):
            if number not in tower.tokenizer(sentence, truncation=True).input_ids:
                raise WadiError(
                    f"{token} is not read in {sentence[:80]!r}, which is cut after {tower.tokenizer.model_max_length} tokens. "
                    "Expected shorter descriptions, with the token between spaces."
                )


def _job(config: InversionConfig, token: str, exemplars: Exemplars, x0: Tensor, rows: Sequence[Tensor]) -> str:
    """A digest of all that decides the result; what only says how far or how often is left out."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("steps", "save_every")}
    digest = hashlib.sha256(json.dumps([settings, token, exemplars.sentences]).encode())
    for tensor in (x0, *rows):
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode(backbone: Backbone, prompts: Sequence[str]) -> Condition:
    """What ``backbone.encode`` makes of the prompts, with the gradient that it leaves out: the same code without its guard."""
    return backbone.encode_with_gradient(prompts)


def nearest(tower: Tower, row: Tensor, token: str, count: int = 5) -> list[str]:
    """The ``count`` vocabulary entries nearest to ``row`` by cosine, the token itself left out."""
    cosines = F.normalize(tower.table.float(), dim=-1) @ F.normalize(row.float().to(tower.table.device), dim=-1)
    cosines[tower.tokenizer.convert_tokens_to_ids(token)] = -2
    names: list[str] = tower.tokenizer.convert_ids_to_tokens(cosines.topk(count).indices.tolist())
    return [name.removesuffix("</w>") for name in names]


def _steering(tower: Tower, token: str, exemplars: Exemplars, words: Sequence[str]) -> _Steering:
    pull = tower.single(words)
    if not pull:
        raise WadiError(
            f"None of the {len(words)} prepositions is a single token of this teacher's vocabulary. Expected at least one: "
            "give some by --words, or --steer 0 to go without."
        )
    neutral = {i for word in (token, *NEUTRAL, *words) for i in tower.ids(word)}
    push = []
    for sentences in exemplars.sentences:
        ids = {i for sentence in sentences for i in tower.ids(sentence)}
        push.append(torch.tensor(sorted(ids - neutral), dtype=torch.long))
    return _Steering(torch.tensor(pull), push)


class _Inversion:
    """The loop: what it draws from, what it moves, one step of it."""

    def __init__(
        self, backbone: Backbone, config: InversionConfig, token: str, exemplars: Exemplars, x0: Tensor, rows: Sequence[Tensor]
    ) -> None:
        self.backbone, self.config, self.exemplars, self.x0 = backbone, config, exemplars, x0
        self.towers, self.network = towers(backbone.pipeline), tensors_digest(backbone.network.state_dict())
        self.earlier = fingerprint(backbone.network)  # what earlier versions stored instead
        leaves = [row.clone().to(x0.device).requires_grad_() for row in rows]
        self.state = states.State(leaves, torch.optim.Adam(leaves, lr=config.lr))
        self.density = focal_density(backbone.process.num_timesteps, config.alpha)
        self.steering = [_steering(t, token, exemplars, config.words) for t in self.towers] if config.steer else []

    def denoise(self, index: Tensor, sentences: Sequence[str], generator: torch.Generator) -> Tensor:
        """``L_denoise`` of exemplars ``index`` ``(B,)`` at random noise and timesteps."""
        process, x0 = self.backbone.process, self.x0[index.to(self.x0.device)]
        t = focal_timesteps(self.density, len(index), generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x_t = process.add_noise(x0, noise, t)
        prediction = self.backbone.predict(x_t, t, encode(self.backbone, sentences))
        return denoising_loss(prediction, x0, noise, x_t, t, process, "none")

    def steer(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """``L_steer``, its mean over encoders, for the things that exemplars ``index`` describe."""
        losses = []
        for tower, row, steering in zip(self.towers, self.state.rows, self.steering, strict=True):
            chosen = torch.randperm(len(steering.pull), generator=generator)[: self.config.positives]
            pushed = torch.cat([steering.push[i] for i in index.tolist()]).unique()
            P, N = (tower.table[ids.to(tower.table.device)].float().to(row.device) for ids in (steering.pull[chosen], pushed))
            losses.append(steering_loss(row, P, N, self.config.temperature))
        return torch.stack(losses).mean()

    def step(self) -> dict[str, float]:
        """One update; every step has a generator of its own, so that an interruption changes nothing."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.state.step)
        index = _indices(len(self.exemplars), self.config.batch, generator)
        choice = torch.randint(2**31, (len(index),), generator=generator).tolist()
        described = [self.exemplars.sentences[i] for i in index.tolist()]
        sentences = [said[c % len(said)] for said, c in zip(described, choice, strict=True)]
        denoise = self.denoise(index, sentences, generator)
        steer = self.steer(index, generator) if self.steering else denoise.new_zeros(())
        (denoise + self.config.steer * steer).backward()
        self.state.step += 1
        if all(row.grad is not None and bool(row.grad.isfinite().all()) for row in self.state.rows):
            self.state.optimiser.step()
        else:
            self.state.skipped += 1
        self.state.optimiser.zero_grad()
        if self.state.skipped >= BAD_STEPS:
            raise WadiError(
                f"The gradient was not finite in {self.state.skipped} of {self.state.step} steps. Expected a sound teacher: "
                "try a smaller --lr, and float32 in place of half precision."
            )
        norm = float(self.state.rows[0].detach().norm())
        return {"denoise": float(denoise.detach()), "steer": float(steer.detach()), "norm": norm}

    def run(self, out: Path, job: str) -> None:
        """All steps that are left.

        Raises:
            Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
        """
        total = self.config.steps
        with stop_on_signals() as stop, progress("inverting", total, self.state.step) as bar:
            while self.state.step < total:
                figures = self.step()
                self.state.stats.append({"step": self.state.step, **figures})
                bar.advance(figures)
                if stop.agreed() or (self.state.step % self.config.save_every == 0 and self.state.step < total):
                    states.save(out, self.state, job, self.network)
                if stop.signal is not None:
                    raise stop.interrupted(f"Stopped at step {self.state.step} of {total}, saved. The same command continues.")

    @torch.no_grad()
    def held(self, rows: Sequence[Tensor]) -> float:
        """Mean ``L_denoise`` over `HELD` fixed draws if the token meant ``rows``."""
        kept = [row.detach().clone() for row in self.state.rows]
        generator = torch.Generator().manual_seed(2**40 + self.config.seed)
        losses = []
        for row, other in zip(self.state.rows, rows, strict=True):
            row.copy_(other)
        for index in _indices(len(self.exemplars), HELD, generator).split(16):
            sentences = [self.exemplars.sentences[i][0] for i in index.tolist()]
            losses.append(float(self.denoise(index, sentences, generator)))
        for row, own in zip(self.state.rows, kept, strict=True):
            row.copy_(own)
        return sum(losses) / len(losses)


def _indices(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """``wanted`` indices below ``count``, each as often as any other within one."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(rounds)[:wanted]
