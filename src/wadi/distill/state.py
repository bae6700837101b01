"""The state of a run: everything that a step changes, and that a checkpoint therefore stores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wadi import roles
from wadi.parallel.ranks import Ranks


@dataclass
class TrainState:
    """The state of a run at a step, apart from its config and its frozen weights.

    Attributes:
        network: the frozen network with both adapters.
        optimizers, scalers: AdamW and ``torch.amp.GradScaler`` by role. The optimiser of the fake model also has ``modules``.
        modules: of the objective, such as the head of a GAN; usually empty.
        generator: source of every random number of a step.
        ema: moving average of the student's adapter, under the names of `roles.state_dict`; empty if there is none.
        ranks: the processes of the run.
        step: steps done.
        prompts_drawn: prompts used so far.
        skipped: steps left out because of a non-finite gradient.
        skipped_in_a_row: by role.
        seconds: time spent in the loop.
        prompts_digest: of the prompts file; ``prompts_drawn`` is a position in these prompts.
        images_per_step: of all processes together.
        teacher_digest: of all files of the teacher (`wadi.backbones.digest`).
    """

    network: Any
    optimizers: dict[str, Optimizer]
    scalers: dict[str, Any]
    generator: torch.Generator
    modules: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    prompts_drawn: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    prompts_digest: str = ""
    images_per_step: int = 0
    teacher_digest: str | None = None

    def trainable(self, role: str) -> list[list[nn.Parameter]]:
        """Return the parameters that the update of a role trains: those of its adapter, and for the fake model ``modules``."""
        adapter = list(roles.trained_parameters(self.network, role).values())
        modules = list(self.modules.parameters()) if role == "fake" else []
        return [group for group in (adapter, modules) if group]


def fingerprint(network: nn.Module) -> str:
    """Return a short hash of a network's weights without its adapters: names, shapes and the first values of each."""
    digest = hashlib.sha256()
    for name, tensor in roles.base_tensors(network).items():
        head = tensor.flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + head)
    return digest.hexdigest()[:16]
