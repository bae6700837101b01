"""Pairs for the warm start: noise, and the teacher's own few-step sample from it. They need prompts only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wadi import roles
from wadi.distill.conditions import Conditions
from wadi.distill.config import DistillConfig, WarmStartConfig
from wadi.distill.run_folder import WARM_START, WARM_START_PARTS, Run
from wadi.errors import WadiError
from wadi.io.files import remove_folder, write_whole
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

    Each process makes its share. Every ``BATCH`` pairs are saved at once, so a run that was stopped meanwhile continues there.

    Raises:
        Stopped: if a signal requests a stop meanwhile.
        WadiError: if the stored pairs are damaged, or the disk is full.
    """
    if config.warm_start.pairs == 0:
        return None
    path, parts = run.folder / WARM_START, run.folder / WARM_START_PARTS
    if not run.ranks.on_first(path.exists):
        rows = order.rows(0, config.warm_start.pairs)
        files = make_pairs(conditions, rows, config.warm_start, config.seed * 1_000_003, stop, parts)
        run.ranks.on_first(lambda: _join(files, path))
    return load_pairs(path, torch.device("cpu"))


def make_pairs(
    conditions: Conditions, rows: Tensor, config: WarmStartConfig, seed: int, stop: Stop, folder: Path
) -> list[Path]:
    """Generate the teacher's samples for the prompts ``rows`` from noise of the seeds ``seed, seed + 1, ...``. Communicates.

    Args:
        folder: where a file of each ``BATCH`` rows is written. Those that exist are kept.
    Returns:
        the files.
    Raises:
        Stopped: if a signal requests a stop; checked before each step of the sampler.
        WadiError: if the disk is full.
    """
    backbone, ranks = conditions.backbone, stop.ranks
    parts = torch.arange(len(rows)).split(BATCH)
    files = [folder / f"{number:06d}.safetensors" for number in range(len(parts))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    ranks.wait_for_all()  # all have looked before one writes
    null, done = backbone.encode([""]), len(rows) - sum(len(parts[number]) for number in missing)
    with roles.active(backbone.network, None), progress("warm-start pairs", len(rows), done) as bar:
        for first in range(0, len(missing), ranks.count):
            mine = first + ranks.index
            # a process without a part of its own repeats the last: all must evaluate a sharded network equally often
            number = missing[min(mine, len(missing) - 1)]
            part = parts[number]
            z = noise(backbone.latent_shape, [seed + int(row) for row in part]).to(backbone.device)
            x0 = many_steps(
                backbone,
                conditions(rows[part]),
                null,
                z,
                config.sampler_steps,
                config.guidance_scale,
                stop.raise_if_requested,
            )
            if mine < len(missing):
                folder.mkdir(parents=True, exist_ok=True)
                save_pairs(Pairs(z, x0, rows[part]), files[number])
            bar.advance(by=len(part) * min(ranks.count, len(missing) - first))
    ranks.wait_for_all()
    return files


def _join(files: Sequence[Path], path: Path) -> None:
    """Write the pairs of all ``files`` to ``path``, and remove them."""
    parts = [load_pairs(file, torch.device("cpu")) for file in files]
    save_pairs(Pairs(*(torch.cat([getattr(part, name) for part in parts]) for name in ("z", "x0", "rows"))), path)
    remove_folder(files[0].parent)


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
