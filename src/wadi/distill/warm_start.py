"""Pairs for the warm start: noise and the teacher's own few-step sample from it, made from prompts alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.distill.config import WarmStartConfig
from wadi.distill.run_folder import Stop
from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.progress import progress
from wadi.io.regular import require_file
from wadi.sampling import many_steps, noise

BATCH = 32


@dataclass
class Pairs:
    """``z`` and ``x0`` ``(pairs, C, H, W)`` float32; ``rows`` ``(pairs,)``, each pair's prompt by its index."""

    z: Tensor
    x0: Tensor
    rows: Tensor


def make_pairs(
    backbone: Backbone,
    conditions: Callable[[Tensor], Condition],
    rows: Tensor,
    config: WarmStartConfig,
    seed: int,
    stop: Stop,
    quiet: bool = False,
) -> Pairs:
    """The teacher's samples for prompts ``rows`` from noise of seeds ``seed, seed + 1, ...``.

    Raises:
        Stopped: if a signal asks for a stop; looked at before each step of the sampler.
    """
    device = next(backbone.network.parameters()).device
    z = noise(backbone.latent_shape, range(seed, seed + len(rows))).to(device)
    null, made = backbone.encode([""]), []
    with roles.active(backbone.network, None), progress("warm-start pairs", len(rows), quiet=quiet) as bar:
        for part in torch.arange(len(rows)).split(BATCH):
            condition = conditions(rows[part])
            steps, guidance_scale = config.sampler_steps, config.guidance_scale
            made.append(many_steps(backbone, condition, null, z[part], steps, guidance_scale, stop.check))
            bar.advance(by=len(part))
    return Pairs(z, torch.cat(made), rows)


def save_pairs(pairs: Pairs, path: Path) -> None:
    """Write the pairs as safetensors, whole or not at all."""
    from safetensors.torch import save

    write_whole(path, save({name: value.cpu().contiguous() for name, value in vars(pairs).items()}))


def load_pairs(path: Path, device: torch.device) -> Pairs:
    """Read what `save_pairs` wrote.

    Raises:
        WadiError: if the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(require_file(path))
        return Pairs(tensors["z"].to(device), tensors["x0"].to(device), tensors["rows"])
    except (OSError, KeyError, SafetensorError) as error:
        raise WadiError(
            f"Warm-start pairs {str(path)!r} are damaged: {error}. Delete the file: it will be made again."
        ) from error
