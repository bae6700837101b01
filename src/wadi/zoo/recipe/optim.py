"""The optimiser of the recipe: momentum with orthogonalised updates for weights, Adam for the rest.

Muon (Jordan et al. 2024): each weight, as a matrix ``(out, rest)``, moves along the nearest orthogonal matrix of its Nesterov
momentum, found by Newton-Schulz iteration. It reaches a given loss in fewer steps than Adam, which matters where a step costs
a third of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """Return the approximate ``U V^T`` of each ``m = U S V^T``, ``(count, rows, columns)``.

    The quintic Newton-Schulz iteration is ``X <- (a + b G + c G^2) X`` with ``G = X X^T`` on the shorter side, in the dtype of
    ``m``; bfloat16 is enough.
    """
    x = m.mT if m.shape[1] > m.shape[2] else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if m.shape[1] > m.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``muon=True``, and Adam (``betas``) for the others; see ``groups_of``.

    ``dtype`` is the precision of the orthogonalisation. Parameters and moments keep their own.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "muon": False, "momentum": momentum, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                by_shape: dict[tuple[int, int], list[Tensor]] = {}
                for p in live:
                    by_shape.setdefault((len(p), p[0].numel()), []).append(p)
                for alike in by_shape.values():
                    self._muon(alike, group)
            else:
                for p in live:
                    self._adam(p, group)
        return None

    def _muon(self, alike: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for p in alike:
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(velocity, group["momentum"]).reshape(len(p), -1))  # type: ignore[union-attr]
        updates = orthogonalise(torch.stack(directions).to(self.dtype)).float()
        rows, columns = updates.shape[1:]
        for p, update in zip(alike, updates, strict=True):
            p.add_(update.reshape(p.shape), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adam(self, p: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        step = state["step"] = state.get("step", torch.zeros(())) + 1
        m = state.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - b1)
        v = state.setdefault("v", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - b2)  # type: ignore[union-attr]
        n = float(step)
        p.addcdiv_(m, (v / (1 - b2**n)).sqrt() + 1e-8, value=-group["lr"] / (1 - b1**n))


_TO_ADAM = ("quant_conv", "conv_out", "token_embedding", "position_embedding", "positional_embedding")


def groups_of(module: nn.Module, lr_muon: float, lr_adam: float, to_adam: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return parameter groups: inner weights for Muon; embeddings, last layers, biases and norms for Adam.

    ``peak`` is each group's full learning rate.

    Args:
        to_adam: parts of the names of further weights for Adam.
    """
    names = (*_TO_ADAM, *to_adam)
    inner = [p for n, p in module.named_parameters() if p.ndim > 1 and not any(part in n for part in names)]
    rest = [p for p in module.parameters() if not any(p is q for q in inner)]
    return [
        {"params": inner, "muon": True, "peak": lr_muon, "lr": lr_muon},
        {"params": rest, "muon": False, "peak": lr_adam, "lr": lr_adam},
    ]
