"""The two ideas of ReVersion (Huang et al., arXiv 2303.13495) that make textual inversion learn a relation, as pure functions.

Relation-focal sampling chooses timestep ``t`` of ``T`` with density

    f(t) = (1 - alpha cos(pi t / T)) / T,

so that noisy steps, which decide the layout of an image, count more than those that decide texture. Relation steering pulls the
token's embedding ``R`` ``(D,)`` towards prepositions ``P`` ``(p, D)`` and away from the things described ``N`` ``(n, D)``:

    L_steer = -log( sum_i exp(cos(R, P_i) / gamma) / (sum_i exp(cos(R, P_i) / gamma) + sum_j exp(cos(R, N_j) / gamma)) ).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The words that steer; of these a tokenizer uses the ones that are a single token.
_PREPOSITIONS = """
    on in of at by to with from above below over under beside between behind before after inside outside into onto near
    off across along around against among beneath beyond through toward towards upon within atop alongside underneath
    opposite past up down out about
"""
PREPOSITIONS = tuple(_PREPOSITIONS.split())
# The token is neither pulled to these words nor pushed away from them: they are not names of things.
_FUNCTION_WORDS = """
    a an the and or but nor if so as than then that this these those it its is are was were be been being has have had do
    does did not no each every some any both all one two three photo picture image style background . , ; : ! ? - ' " & ( )
"""
NEUTRAL = (*PREPOSITIONS, *_FUNCTION_WORDS.split())


def focal_density(num_timesteps: int, alpha: float) -> Tensor:
    """Return ``f(t)`` for ``t = 0 .. T - 1``, in float64, with sum 1. ``alpha = 0`` is uniform, 1 the strongest skew."""
    t = torch.arange(num_timesteps, dtype=torch.float64)
    density = 1 - alpha * torch.cos(math.pi * t / num_timesteps)
    return density / density.sum()


def focal_timesteps(density: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` random timesteps ``(count,)`` with ``density`` ``(T,)``."""
    return torch.multinomial(density, count, replacement=True, generator=generator)


def steering_loss(R: Tensor, P: Tensor, N: Tensor, gamma: float) -> Tensor:
    """Return ``L_steer``, a scalar. Only ``R`` receives a gradient. The loss is 0 if ``N`` is empty."""
    others = F.normalize(torch.cat([P, N]).detach(), dim=-1)
    logits = others @ F.normalize(R, dim=-1) / gamma
    return logits.logsumexp(0) - logits[: len(P)].logsumexp(0)
