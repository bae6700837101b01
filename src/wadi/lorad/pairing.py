"""Which columns of a weight ``(o, i)`` share an angle. The rotation itself rotates neighbours; partners are brought together.

neighbours   columns ``2j`` and ``2j + 1``, as in the paper
halves       columns ``j`` and ``j + i // 2``, as in rotary position embeddings
random       pairs chosen at random, the same ones in every layer with ``i`` columns
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError, short_repr

PAIRINGS = ("neighbours", "halves", "random")
NEIGHBOURS = PAIRINGS[0]


def stored_pairing(config: Mapping[str, Any], source: str) -> str:
    """Return the pairing in an adapter's ``adapter_config.json``; older ones do not say.

    Raises:
        WadiError: if it is unknown.
    """
    pairing = config.get("pairing", NEIGHBOURS)
    if pairing not in PAIRINGS:
        raise WadiError(f"Adapter {source!r} has the pairing {short_repr(pairing)}. It must be one of {', '.join(PAIRINGS)}.")
    return str(pairing)


@cache
def column_order(pairing: str, fan_in: int) -> tuple[Tensor, Tensor]:
    """Return an order of the columns in which partners are neighbours, and its inverse, each ``(i,)``.

    An odd last column has no partner with ``halves``; with ``random``, any column may be the one without.
    """
    if pairing == "halves":
        half = fan_in // 2
        order = torch.cat((torch.arange(2 * half).view(2, half).T.flatten(), torch.arange(2 * half, fan_in)))
    else:
        order = torch.randperm(fan_in, generator=torch.Generator().manual_seed(fan_in))
    return order, order.argsort()


def with_partners_together(turn: Callable[[Tensor], Tensor], W: Tensor, pairing: str) -> Tensor:
    """Return ``turn(W)``, where ``turn`` rotates neighbouring columns, for partners by ``pairing``. Autograd passes through."""
    if pairing == NEIGHBOURS:
        return turn(W)
    order, inverse = (columns.to(W.device) for columns in column_order(pairing, W[0].numel()))
    return turn(W.flatten(1)[:, order])[:, inverse].view(W.shape)
