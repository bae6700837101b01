"""Save and resume the stages of the recipe: tensors in safetensors, the rest as JSON in its header, no pickle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wadi.distill.schedules import average_weight, cosine, rise
from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.moments import moments_of, restore_moments
from wadi.io.records import parse_json
from wadi.io.tensors import read_with_metadata


def save_tensors(path: Path, tensors: dict[str, Tensor], note: dict[str, Any] | None = None) -> None:
    """Write ``tensors`` and the JSON-able ``note`` to one safetensors file, completely or not at all."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, metadata={"note": json.dumps(note or {})}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote.

    Raises:
        WadiError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise WadiError(f"{path} does not exist. Run the earlier stages of the recipe first.")
    tensors, metadata = read_with_metadata(path, "The file", "Delete it and run the stage again.")
    return tensors, parse_json(metadata.get("note", "{}"), dict[str, Any], f"The note in {str(path)!r}")


class Budget:
    """Training time as a fraction of a budget in minutes. ``elapsed`` carries over an interruption."""

    def __init__(self, minutes: float, elapsed: float = 0.0) -> None:
        if not minutes > 0:
            raise WadiError(f"The training budget is {minutes} minutes. It must be positive.")
        self.seconds, self.before, self.start = 60 * minutes, elapsed, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds spent, those of earlier runs included."""
        return self.before + time.monotonic() - self.start

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, at most 1."""
        return min(self.elapsed / self.seconds, 1.0)

    def rate(self, warmup: float = 0.01) -> float:
        """Return the factor on the learning rate: linear warm-up over ``warmup`` of the budget, then cosine to zero."""
        u = self.fraction
        return rise(u, warmup) * cosine(u, 1) if warmup else 1.0


class Average:
    """Exponential moving average of a module's parameters, with a shorter memory at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's parameters."""
        self.steps += 1
        weight = average_weight(self.steps, self.decay)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [parameters[n].detach() for n in self.values], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Copy the average into a module."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state with each tensor once: a T5 encoder has its embedding under two names."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            state[name] = tensor
            seen.add(tensor.data_ptr())
    return state


def load_own_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `own_state` returned, or a module's named parameters."""
    module.load_state_dict({**module.state_dict(), **{name: state[name] for name in own_state(module)}})


def save_run(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: Average, **note: Any) -> None:
    """Write one file with everything that a stage needs to continue: weights, average, optimiser moments, ``note``."""
    tensors = {f"model.{k}": v for k, v in own_state(module).items()}
    tensors |= {f"average.{k}": v for k, v in average.values.items()}
    tensors |= moments_of(optimiser, "optimiser.")
    save_tensors(path, tensors, {"average_steps": average.steps, **note})


def resume_run(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: Average) -> dict[str, Any] | None:
    """Load what ``save_run`` wrote into the three objects. Return its note, or None if there is nothing to resume."""
    if not path.is_file():
        return None
    tensors, note = load_tensors(path)
    load_own_state(module, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    average.values = {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}
    average.steps = note["average_steps"]
    restore_moments(optimiser, tensors, "optimiser.")
    return note
