"""Pairs for the warm start: noise, and the teacher's own few-step sample from it. They need prompts only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wadi import roles
from wadi.distill.conditions import Conditions
from wadi.distill.config import DistillConfig, WarmStartConfig
from wadi.distill.run_folder import WARM_START, Run
from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.progress import progress
from wadi.io.regular import require_file
from wadi.parallel.signals import Stop
from wadi.prompts.order import PromptOrder
from wadi.sampling import many_steps, noise

BATCH = 32


@dataclass
class Pairs:
    """Warm-start pairs.

    Attributes:
        z: noise, ``(pairs, C, H, W)``, float32.
        x0: the teacher's samples from it, of the same shape.
        rows: index of each pair's prompt, ``(pairs,)``.
    """

    z: Tensor
    x0: Tensor
    rows: Tensor


def pairs_of_run(conditions: Conditions, config: DistillConfig, run: Run, order: PromptOrder, stop: Stop) -> Pairs | None:
    """Return the pairs of a run, made once and stored in its folder; None if the config wants none. Communicates.

    Every process makes the same pairs, and the first one writes them.

    Raises:
        Stopped: if a signal requests a stop meanwhile.
        WadiError: if the stored pairs are damaged.
    """
    if config.warm_start.pairs == 0:
        return None
    path = run.folder / WARM_START
    if not run.ranks.on_first(path.exists):
        rows = order.rows(0, config.warm_start.pairs)
        pairs = make_pairs(conditions, rows, config.warm_start, config.seed * 1_000_003, stop)
        run.ranks.on_first(lambda: save_pairs(pairs, path))
    return load_pairs(path, torch.device("cpu"))


def make_pairs(conditions: Conditions, rows: Tensor, config: WarmStartConfig, seed: int, stop: Stop) -> Pairs:
    """Generate the teacher's samples for the prompts ``rows`` from noise of the seeds ``seed, seed + 1, ...``.

    Raises:
        Stopped: if a signal requests a stop; checked before each step of the sampler.
    """
    backbone = conditions.backbone
    device = next(backbone.network.parameters()).device
    z = noise(backbone.latent_shape, range(seed, seed + len(rows))).to(device)
    null, samples = backbone.encode([""]), []
    with roles.active(backbone.network, None), progress("warm-start pairs", len(rows)) as bar:
        for part in torch.arange(len(rows)).split(BATCH):
            condition = conditions(rows[part])
            steps, guidance_scale = config.sampler_steps, config.guidance_scale
            samples.append(many_steps(backbone, condition, null, z[part], steps, guidance_scale, stop.raise_if_requested))
            bar.advance(by=len(part))
    return Pairs(z, torch.cat(samples), rows)


def save_pairs(pairs: Pairs, path: Path) -> None:
    """Write the pairs as safetensors, completely or not at all."""
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
            f"Warm-start pairs {str(path)!r} are damaged: {error}. Delete the file; the same command makes them again."
        ) from error
