"""Generate images from prompts and seeds with any pipeline of a known family.

Each image starts from noise of its own seed, so it depends neither on the batch size nor on the other images of its batch.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wadi.backbones import family, from_pipeline
from wadi.backbones.load_errors import explain_run_errors
from wadi.diffusion.autoencoder import finite_decoding
from wadi.errors import WadiError
from wadi.io.bounds import SEEDS
from wadi.io.progress import progress
from wadi.parallel.device import explained_when_full

WHEN_FULL = "Generate fewer images at once (--batch; in wadi eval --draw-batch), or load the model with --dtype bfloat16."

Start = Callable[[Sequence[torch.Generator]], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How to call a pipeline.

    Attributes:
        steps: steps of the scheduler.
        guidance_scale: ``w`` of ``uncond + w (cond - uncond)``, passed in the way the family's pipeline takes it; None or 1 =
            no guidance.
        batch: images per call. It changes memory and speed, not the images.
        call: further arguments of the call (``height``, ``image``, ...). They override all others.
        start: function from generators, one per image, to the ``latents`` of the call; None = noise, as the pipeline generates
            it.
    """

    steps: int = 1
    guidance_scale: float | None = None
    batch: int = 8
    call: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None


@dataclass(frozen=True)
class Generated:
    """Images in the order of the prompts, and the median time per image over batches in milliseconds."""

    images: list[Image.Image]
    ms_per_image: float


def generate_images(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None) -> Generated:
    """Generate one image for each pair of prompt and seed.

    Raises:
        WadiError: if a number is out of range, there is no prompt, or an image contains NaN or infinity.
    """
    images: list[Image.Image] = []
    times = []
    for batch, ms in generate_batches(pipeline, prompts, seeds, sampling):
        images += batch
        times.append(ms)
    return Generated(images, median(times))


def generate_batches(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling | None = None
) -> Iterator[tuple[list[Image.Image], float]]:
    """Generate as `generate_images` does, and yield the images of each batch with the milliseconds per image."""
    sampling = sampling or Sampling()
    check_request(prompts, seeds, sampling)
    batch = sampling.batch
    with progress("generating", len(prompts), quiet=len(prompts) <= batch) as bar:
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            own = family_call(pipeline, sampling.guidance_scale, len(generators))
            arguments = {"num_inference_steps": sampling.steps, **own, **sampling.call}
            begin = time.perf_counter()
            latents = {} if sampling.start is None else {"latents": sampling.start(generators)}
            full = explained_when_full(pipeline.device, lambda: f"generating {len(generators)} at once", WHEN_FULL)  # noqa: B023
            failing = explain_run_errors(f"{type(pipeline).__name__} cannot generate")
            with full, failing, _noise_from(generators, pipeline.scheduler), finite_decoding(pipeline.vae):
                images = pipeline(prompt=list(prompts[part]), generator=generators, **arguments, **latents).images
            yield images, 1000 * (time.perf_counter() - begin) / len(images)
            bar.advance(by=len(images))


def check_request(prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> None:
    """Raise `WadiError` unless there are as many seeds as prompts, at least one, and all numbers are in range."""
    if not prompts or len(prompts) != len(seeds):
        raise WadiError(f"Received {len(prompts)} prompts and {len(seeds)} seeds. Give one seed for each prompt.")
    if sampling.batch < 1 or sampling.steps < 1:
        raise WadiError(f"batch is {sampling.batch} and steps is {sampling.steps}. Both must be at least 1.")
    check_seeds(min(seeds), max(seeds))


def check_seeds(first: int, last: int) -> None:
    """Raise `WadiError` unless all seeds from ``first`` to ``last`` are seeds that torch accepts."""
    if first < 0 or last >= SEEDS:
        raise WadiError(f"Seeds run from {first} to {last}. Expected whole numbers from 0 to 2^63 - 1.")


def family_call(pipeline: Any, guidance_scale: float | None = None, prompts: int = 1) -> dict[str, Any]:
    """Return the call arguments with which a pipeline generates at its own size and the given guidance scale.

    Raises:
        WadiError: if a scale is given for a pipeline of an unknown family: only the family knows how its pipeline takes it.
    """
    try:
        family(type(pipeline).__name__)
    except WadiError:
        if guidance_scale is not None:
            raise
        return {}  # for example one with a ControlNet, whose arguments come in `Sampling.call`
    backbone = from_pipeline(pipeline)
    return backbone.call if guidance_scale is None else backbone.guided_call(guidance_scale, prompts)


def median(values: Sequence[float]) -> float:
    """Return the middle value, the upper one of two; 0 for an empty sequence."""
    return statistics.median_high(values) if values else 0.0


@contextmanager
def _noise_from(generators: Sequence[torch.Generator], scheduler: Any) -> Iterator[None]:
    """Within the block a scheduler that adds noise takes it from ``generators``, even if the pipeline does not pass them on."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    scheduler.step = partial(scheduler.step, generator=list(generators))
    try:
        yield
    finally:
        del scheduler.step
