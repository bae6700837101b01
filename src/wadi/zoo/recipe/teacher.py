"""Stage 3 of the recipe: a teacher's network and its text encoder, trained together in the autoencoder's latents.

What differs between the U-Net and the DiT is in `unet.py` and `dit.py`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wadi.backbones import from_pipeline
from wadi.io.imports import imported
from wadi.zoo.recipe.autoencoder import CHANNELS
from wadi.zoo.recipe.config import MODELS
from wadi.zoo.recipe.icons import Sprites
from wadi.zoo.recipe.kinds import SIDE, Kind, product_dtype
from wadi.zoo.recipe.optim import Muon, groups_of
from wadi.zoo.recipe.state import Average, Budget, load_own_state, load_tensors, resume_run, save_run

if TYPE_CHECKING:
    from wadi.zoo.recipe.config import ZooConfig


def kind_of(model: str) -> Kind:
    """Return the kind of teacher that ``--model`` names."""
    kind: Kind = imported(MODELS[model])()
    return kind


@torch.no_grad()
def sample(pipe: Any, prompts: list[str], seeds: list[int], kind: Kind, batch: int = 32, steps: int | None = None) -> Tensor:
    """Return images ``(N, 3, 64, 64)`` in [0, 1] in the steps and at the guidance of ``kind``, one generator for each."""
    parts, call = [], from_pipeline(pipe).guided_call(kind.guidance_scale)
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        run = pipe(
            prompts[i : i + batch],
            num_inference_steps=steps or kind.steps,
            generator=generators,
            output_type="pt",
            **call,
        )
        parts.append(run.images)
    return torch.cat(parts)


@dataclass
class Pool:
    """A ring of latents ``(capacity, 12, 16, 16)`` fp16 with the labels of their contents, on the CPU. New latents replace the
    oldest.
    """

    latents: Tensor
    labels: Tensor  # (capacity, n)
    filled: int = 0
    next: int = 0

    def add(self, latents: Tensor, labels: Tensor) -> None:
        """Add latents and their labels."""
        where = (self.next + torch.arange(len(latents))) % len(self.latents)
        self.latents[where.to(self.latents.device)], self.labels[where] = latents.half(), labels
        self.next = int(where[-1] + 1) % len(self.latents)
        self.filled = min(self.filled + len(latents), len(self.latents))


def load_trained(ae: Any, out: Path, kind: Kind) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of the averaged weights in ``out``'s checkpoint, and the checkpoint's note."""
    tensors, note = load_tensors(out / f"{kind.file}.safetensors")
    tokenizer = kind.text.load_tokenizer(tokenizer_folder(out, kind))
    model = kind.build(tokenizer).eval()
    for name, module in model.items():
        prefix = f"average.{name}."
        load_own_state(module, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return kind.assemble(ae, model, tokenizer), note


def tokenizer_folder(out: Path, kind: Kind) -> Path:
    """Return the folder of a teacher's tokenizer."""
    return out / ("tokenizer" if kind.file == "teacher" else f"tokenizer-{kind.name}")


def train_teacher(config: ZooConfig, ae: Any, sprites: Sprites, out: Path) -> None:
    """Train for ``config.minutes_teacher``, resuming from ``out``. Write ``FILE.safetensors`` of the kind there.

    SIGINT and SIGTERM save and end the training.
    """
    from wadi.parallel.device import find_device
    from wadi.parallel.signals import stop_on_signals
    from wadi.zoo.recipe.report import log

    kind, device = kind_of(config.model), find_device(config.device)
    minutes = kind.minutes if config.minutes_teacher is None else config.minutes_teacher
    torch.manual_seed(config.seed)
    place = tokenizer_folder(out, kind)
    if not place.is_dir():
        kind.text.write_tokenizer(place)
    tokenizer = kind.text.load_tokenizer(place)
    model = kind.build(tokenizer)
    model.to(device)
    groups = groups_of(model, config.lr_teacher, 2e-3, kind.to_adam)
    optimiser = Muon(groups, lr=config.lr_teacher, dtype=product_dtype(device))
    average, path = Average(model, 0.9985), out / f"{kind.file}.safetensors"
    note = resume_run(path, model, optimiser, average) or {"elapsed": 0.0, "step": 0}
    if note["elapsed"] >= 60 * minutes:
        return
    step, last_grid = note["step"], note["elapsed"]
    generator = torch.Generator().manual_seed(config.seed + step)
    concept_sprites = sprites.pixels[sprites.of_concepts()].to(device)
    ae = copy.deepcopy(ae).to(device)
    pool = fill_pool(config, kind, ae, concept_sprites, generator)
    budget = Budget(minutes, note["elapsed"])
    with log(out / f"{kind.file}.jsonl", f"{kind.name} teacher", budget) as log_lines, stop_on_signals() as stop:
        while budget.fraction < 1 and stop.signal is None:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * budget.rate()
            pool.add(*kind.latents(ae, concept_sprites, kind.labels(config.fresh_per_step, generator), generator))
            index = torch.randint(pool.filled, (config.batch_teacher,), generator=generator)
            texts = kind.captions(pool.labels[index], generator)
            loss = kind.loss(model, tokenizer, texts, pool.latents[index.to(device)].float(), generator)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
            step += 1
            log_lines.step(loss.item(), len(index))
            ended = budget.fraction >= 1 or stop.signal is not None
            if budget.elapsed - last_grid > 60 * config.minutes_grid or ended:
                last_grid = budget.elapsed
                save_run(path, model, optimiser, average, elapsed=budget.elapsed, step=step)
                log_lines.write(step=step)
                if stop.signal is None:
                    grid = out / f"{kind.file}-{budget.elapsed / 60:03.0f}min.png"
                    save_samples(load_trained(ae, out, kind)[0], grid, kind)
    if stop.signal is not None:
        done = f"{budget.elapsed / 60:.0f} of {minutes:g} minutes"
        raise stop.interrupted(f"Stopped after {done}, saved. The same command continues.")


def fill_pool(config: ZooConfig, kind: Kind, ae: Any, concept_sprites: Tensor, generator: torch.Generator) -> Pool:
    """Return a pool that starts with ``config.first_fill`` images for every label to start with."""
    labels = torch.zeros(config.pool, kind.label_size).long()
    latents = torch.empty(config.pool, CHANNELS, SIDE, SIDE, dtype=torch.half, device=concept_sprites.device)
    pool = Pool(latents, labels)
    for _ in range(config.first_fill):
        for part in kind.labels(None, generator).split(96):
            pool.add(*kind.latents(ae, concept_sprites, part, generator))
    return pool


def save_samples(pipe: Any, path: Path, kind: Kind) -> None:
    """Write the grid of fixed prompts: four seeds of each, three prompts in a row."""
    from wadi.zoo.recipe.report import save_grid

    prompts = kind.fixed_prompts()
    images = sample(pipe, [p for p in prompts for _ in range(4)], list(range(4)) * len(prompts), kind, batch=24)
    save_grid(path, images, columns=12)
