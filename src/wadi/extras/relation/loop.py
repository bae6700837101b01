"""The training loop of a relation token, and one update of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wadi.backbones import Backbone
from wadi.backbones.digest import tensors_digest
from wadi.distill.objectives.denoise import denoising_loss
from wadi.distill.state import fingerprint
from wadi.errors import WadiError
from wadi.extras.balanced import balanced_indices
from wadi.extras.relation.config import RelationConfig
from wadi.extras.relation.exemplars import Exemplars
from wadi.extras.relation.loss import NEUTRAL, focal_density, focal_timesteps, steering_loss
from wadi.extras.relation.state import TokenState, save_state
from wadi.extras.relation.vocabulary import TextEncoder, text_encoders
from wadi.io.progress import progress
from wadi.parallel.signals import stop_on_signals

BAD_STEPS = 10  # steps whose gradient is not finite, before the training gives up
EVALUATED = 64  # (exemplar, noise, timestep) triples on which a token is evaluated before and after


@dataclass(frozen=True)
class SteeringTokens:
    """Token ids of one text encoder: ``pull`` are the prepositions, ``push`` the things that each exemplar describes."""

    pull: Tensor
    push: list[Tensor]


def steering_tokens(encoder: TextEncoder, token: str, exemplars: Exemplars, words: Sequence[str]) -> SteeringTokens:
    """Return the tokens that steer ``token``.

    Args:
        words: prepositions; those that are not one token are left out.
    Raises:
        WadiError: if none of ``words`` is one token.
    """
    pull = encoder.single_token_ids(words)
    if not pull:
        raise WadiError(
            f"None of the {len(words)} prepositions is a single token of this teacher's vocabulary: {', '.join(words)[:200]}. "
            "Give others with --words, or turn steering off with --steer 0."
        )
    neutral = {i for word in (token, *NEUTRAL, *words) for i in encoder.ids_of(word)}
    push = []
    for sentences in exemplars.sentences:
        ids = {i for sentence in sentences for i in encoder.ids_of(sentence)}
        push.append(torch.tensor(sorted(ids - neutral), dtype=torch.long))
    return SteeringTokens(torch.tensor(pull), push)


class TokenTraining:
    """The training of one token.

    Args:
        x0: latents of the exemplars.
        rows: embedding of the token for each text encoder, to start from.
    """

    def __init__(
        self, backbone: Backbone, config: RelationConfig, token: str, exemplars: Exemplars, x0: Tensor, rows: Sequence[Tensor]
    ) -> None:
        self.backbone, self.config, self.exemplars, self.x0 = backbone, config, exemplars, x0
        self.encoders, self.network = text_encoders(backbone.pipeline), tensors_digest(backbone.network.state_dict())
        self.earlier_network = fingerprint(backbone.network)  # as earlier versions saved it
        leaves = [row.clone().to(x0.device).requires_grad_() for row in rows]
        self.state = TokenState(leaves, torch.optim.Adam(leaves, lr=config.lr))
        self.density = focal_density(backbone.process.num_timesteps, config.alpha)
        self.steering = [steering_tokens(e, token, exemplars, config.words) for e in self.encoders] if config.steer else []

    def train(self, out: Path, job: str) -> None:
        """Do all steps that are left. The state is saved next to ``out``.

        Args:
            job: digest that the saved state is checked by.
        Raises:
            Interrupted: on SIGINT, SIGTERM or SIGHUP, after saving.
            WadiError: if the gradient of `BAD_STEPS` steps is not finite.
        """
        total = self.config.steps
        with stop_on_signals() as stop, progress("inverting", total, self.state.step) as bar:
            while self.state.step < total:
                losses = self.step()
                self.state.statistics.append({"step": self.state.step, **losses})
                bar.advance(losses)
                if stop.synchronise() or (self.state.step % self.config.save_every == 0 and self.state.step < total):
                    save_state(out, self.state, job, self.network)
                if stop.signal is not None:
                    raise stop.interrupted(f"Stopped at step {self.state.step} of {total}, saved. The same command continues.")

    def step(self) -> dict[str, float]:
        """Update the token once. Every step has its own random generator, so that an interruption changes nothing."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.state.step)
        index = balanced_indices(len(self.exemplars), self.config.batch, generator)
        choice = torch.randint(2**31, (len(index),), generator=generator).tolist()
        described = [self.exemplars.sentences[i] for i in index.tolist()]
        prompts = [sentences[c % len(sentences)] for sentences, c in zip(described, choice, strict=True)]
        denoise = self.denoising_loss(index, prompts, generator)
        steer = self.steering_loss(index, generator) if self.steering else denoise.new_zeros(())
        (denoise + self.config.steer * steer).backward()
        self.state.step += 1
        if all(row.grad is not None and bool(row.grad.isfinite().all()) for row in self.state.rows):
            self.state.optimizer.step()
        else:
            self.state.skipped += 1
        self.state.optimizer.zero_grad()
        if self.state.skipped >= BAD_STEPS:
            raise WadiError(
                f"The gradient was not finite in {self.state.skipped} of {self.state.step} steps. Use a smaller --lr, float32 "
                "instead of half precision, or another teacher."
            )
        norm = float(self.state.rows[0].detach().norm())
        return {"denoise": float(denoise.detach()), "steer": float(steer.detach()), "norm": norm}

    def denoising_loss(self, index: Tensor, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
        """Return ``L_denoise`` of the exemplars ``index`` ``(B,)`` at random noise and timesteps."""
        process, x0 = self.backbone.process, self.x0[index.to(self.x0.device)]
        t = focal_timesteps(self.density, len(index), generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x_t = process.add_noise(x0, noise, t)
        prediction = self.backbone.predict(x_t, t, self.backbone.encode_with_gradient(prompts))
        return denoising_loss(prediction, x0, noise, x_t, t, process, "none")

    def steering_loss(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``L_steer`` for the things that the exemplars ``index`` describe, its mean over text encoders."""
        losses = []
        for encoder, row, steering in zip(self.encoders, self.state.rows, self.steering, strict=True):
            chosen = torch.randperm(len(steering.pull), generator=generator)[: self.config.positives]
            pushed = torch.cat([steering.push[i] for i in index.tolist()]).unique()
            P, N = (
                encoder.table[ids.to(encoder.table.device)].float().to(row.device) for ids in (steering.pull[chosen], pushed)
            )
            losses.append(steering_loss(row, P, N, self.config.temperature))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Tensor]) -> float:
        """Return the mean ``L_denoise`` with ``rows`` as the token's embeddings, on the same `EVALUATED` triples every time."""
        learned = [row.detach().clone() for row in self.state.rows]
        generator = torch.Generator().manual_seed(2**40 + self.config.seed)
        losses = []
        for leaf, row in zip(self.state.rows, rows, strict=True):
            leaf.copy_(row)
        for index in balanced_indices(len(self.exemplars), EVALUATED, generator).split(16):
            prompts = [self.exemplars.sentences[i][0] for i in index.tolist()]
            losses.append(float(self.denoising_loss(index, prompts, generator)))
        for leaf, row in zip(self.state.rows, learned, strict=True):
            leaf.copy_(row)
        return sum(losses) / len(losses)
