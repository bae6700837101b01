"""Generate images into files: one image, several with a grid of them, or a folder that a later call completes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from wadi.errors import WadiError
from wadi.io import grids, image_folder
from wadi.pipelines.generate import Sampling, check_seeds, generate_batches, median

MOST_IMAGES = 1_000_000  # per call


@dataclass(frozen=True)
class GeneratedFiles:
    """The files of a call.

    Attributes:
        paths: one per image, in the order of the prompts.
        existing: number of images that were there already and were kept.
        ms_per_image: median over batches in milliseconds; 0 if nothing was generated.
    """

    paths: list[Path]
    existing: int
    ms_per_image: float


@dataclass(frozen=True)
class Folder:
    """How to write into a folder that may already contain images.

    Attributes:
        settings: everything apart from prompt and seed that the images depend on, as JSON values.
        overwrite: replace images that other settings, another prompt or another program made.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False


def plan_images(prompts: Sequence[str], seed: int, count: int) -> list[image_folder.PlannedImage]:
    """Return file name, prompt and seed of ``count`` images of each prompt; seeds count up from ``seed``.

    Raises:
        WadiError: if count or seed is out of range, or there is no prompt.
    """
    if not 1 <= count <= MOST_IMAGES:
        raise WadiError(f"count is {count}. Expected 1 to {MOST_IMAGES:,}.")
    if len(prompts) * count > MOST_IMAGES:
        raise WadiError(
            f"{len(prompts):,} prompts with count {count:,} are {len(prompts) * count:,} images. Generate at most "
            f"{MOST_IMAGES:,} at once."
        )
    if not prompts:
        raise WadiError("Received no prompt. Give at least one.")
    check_seeds(seed, seed + len(prompts) * count - 1)
    rows = enumerate(prompt for prompt in prompts for _ in range(count))
    return [image_folder.PlannedImage(file_name(i, prompt, seed + i), prompt, seed + i) for i, prompt in rows]


def file_name(index: int, prompt: str, seed: int) -> str:
    """Return a name such as ``00003-red-apple-7.png``, which every file system accepts."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{index:05d}-{words or 'prompt'}-{seed}.png"


def generate_folder(
    pipeline: Any,
    images: Sequence[image_folder.PlannedImage],
    out: Path,
    sampling: Sampling | None = None,
    folder: Folder | None = None,
) -> GeneratedFiles:
    """Generate ``images`` into the folder ``out``, with a manifest of how each was made (`wadi.io.image_folder`).

    Images that are there already with the same settings are kept. Each batch is written as soon as it is generated, so the same
    call continues an interrupted one.

    Raises:
        WadiError: if ``out`` cannot be written, or contains one of the images made in another way and ``overwrite`` is off.
    """
    folder = folder or Folder()
    missing = [images[row] for row in image_folder.missing_images(out, images, folder.settings, folder.overwrite)]
    times, done = [], 0
    for batch, ms in _batches(pipeline, missing, sampling):
        part = missing[done : done + len(batch)]
        image_folder.write_images(out, part, [grids.encode_png(image) for image in batch], folder.settings)
        done += len(batch)
        times.append(ms)
    return GeneratedFiles([out / image.file for image in images], len(images) - len(missing), median(times))


def generate_file(
    pipeline: Any, images: Sequence[image_folder.PlannedImage], out: Path, sampling: Sampling | None = None
) -> GeneratedFiles:
    """Generate one image into the file ``out``; of several, a grid into ``out`` and each image next to it under its seed.

    Existing files of these names are replaced.

    Raises:
        WadiError: if a file cannot be written.
    """
    paths = [out] if len(images) == 1 else [out.with_name(f"{out.stem}-{image.seed}{out.suffix}") for image in images]
    written: list[Image.Image] = []
    times = []
    for batch, ms in _batches(pipeline, images, sampling):
        for image in batch:
            grids.save_png(image, paths[len(written)])
            written.append(image)
        times.append(ms)
    if len(images) > 1:
        grids.save_png(grids.compose_grid([written], [""], scale=grids.enlargement(written[0])), out)
    return GeneratedFiles(paths, 0, median(times))


def _batches(
    pipeline: Any, images: Sequence[image_folder.PlannedImage], sampling: Sampling | None
) -> Iterator[tuple[list[Image.Image], float]]:
    if images:
        yield from generate_batches(pipeline, [image.prompt for image in images], [image.seed for image in images], sampling)
