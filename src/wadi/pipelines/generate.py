"""One-step images from a run, an adapter or an export: an ordinary diffusers pipeline, and pictures from it."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wadi import roles
from wadi.backbones import family, from_pipeline, load_pipeline
from wadi.backbones.load_errors import explain_run_errors
from wadi.diffusion.autoencoder import finite_decoding
from wadi.diffusion.schedulers import one_step_scheduler
from wadi.distill import config
from wadi.errors import WadiError
from wadi.io import grids, image_folder
from wadi.io.bounds import SEEDS
from wadi.io.progress import progress
from wadi.parallel.device import explained_when_full
from wadi.zoo.paths import embedded_path, resolve_teacher

WHEN_FULL = (
    "Generate fewer images at once: set a lower --batch (of wadi eval: --draw_batch), or load the model with --dtype bfloat16 "
    "where that is offered."
)
MOST_IMAGES = 1_000_000  # of one command


def load(
    run: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    teacher: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """A diffusers pipeline whose plain call ``pipe(prompt, num_inference_steps=1, guidance_scale=0.0)`` is the one-step image.

    (For FLUX ``guidance_scale=3.5``, its own default, which is an input of its network.) The rotation is merged into the
    weights and the scheduler starts at the student's timestep: nothing of this package is needed to use the pipeline, or what
    its ``save_pretrained`` writes.

    Args:
        run: folder of a run, or of an exported one-step pipeline; None with no ``adapter`` = the embedded student.
        adapter: folder of a student's adapter, with ``teacher`` if not the one it names.
        teacher: pipeline folder or Hub id that the rotation is applied to.
    Raises:
        WadiError: if a folder is not what it should be, or adapter and teacher do not fit.
    """
    if run is not None and (Path(run) / "model_index.json").is_file() and adapter is None:
        return load_pipeline(run, dtype, device)
    folder, base = locate(run, adapter, teacher)
    about = about_of(folder)
    pipeline = load_pipeline(base, dtype, device)
    backbone = from_pipeline(pipeline, about.resolution)
    roles.refuse_adapted(backbone.network)
    roles.load(backbone.network, folder, "student")
    roles.fuse(backbone.network, "student")
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, about.timestep)
    backbone.remember_resolution()
    return pipeline


def teacher_of(
    run: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    teacher: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """The many-step pipeline behind a student, with the family's deterministic sampler; arguments as of `load`."""
    folder, base = locate(run, adapter, teacher)
    pipeline = load_pipeline(base, dtype, device)
    backbone = from_pipeline(pipeline, about_of(folder).resolution)
    pipeline.scheduler = backbone.sampler()
    backbone.remember_resolution()
    return pipeline


def locate(run: str | Path | None, adapter: str | Path | None, teacher: str | Path | None) -> tuple[Path, str]:
    """``(adapter folder, teacher's path or Hub id)`` of what a caller names."""
    if run is not None and adapter is not None:
        raise WadiError("Received both a run and an adapter. Expected one of them.")
    if run is not None:
        settings = Path(run) / "config.yaml"
        if not settings.is_file():
            raise WadiError(
                f"{str(run)!r} is no run: it holds no config.yaml. Expected the --out of `wadi distill`, or (to draw from) a "
                "folder written by `wadi export`."
            )
        # Bounds are not checked: earlier versions allowed settings that are refused today.
        folder, named = Path(run) / "student", config.read_settings(settings).get("teacher")
        if not (named or teacher):
            raise WadiError(f"Config {str(settings)!r} names no teacher. Set --teacher.")
        if not folder.is_dir():
            raise WadiError(f"Run {str(run)!r} has saved no student yet. Expected a finished or interrupted run.")
    else:
        folder = Path(adapter) if adapter is not None else embedded_path("student")
        named = about_of(folder).teacher
    return folder, resolve_teacher(str(teacher or named))


def about_of(folder: Path) -> roles.About:
    """What a student's adapter folder says about it (``wadi.json``).

    Raises:
        WadiError: if the folder is not an adapter, or ``wadi.json`` is missing or damaged.
    """
    roles.read(folder)  # complain about the adapter before anything else
    return roles.read_about(folder)


@dataclass(frozen=True)
class Drawn:
    """Pictures in the order of the prompts, and the median milliseconds per picture over batches."""

    pictures: list[Image.Image]
    ms_per_image: float


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 1,
    guidance_scale: float | None = None,
    batch: int = 8,
    call: Mapping[str, Any] | None = None,
    start: Callable[[Sequence[torch.Generator]], Tensor] | None = None,
) -> Drawn:
    """One picture per prompt and seed, each from noise of its own seed: batches and neighbours do not enter.

    Args:
        guidance_scale: ``w`` of ``uncond + w (cond - uncond)``, passed as the family's pipeline takes it; None or 1 = no
            guidance.
        call: further arguments of the pipeline's call (``height``, ``width``, ``image``, ...), which go before all others.
        start: from generators, one per picture, to the call's ``latents``; None = noise, as the pipeline draws it.
    Raises:
        WadiError: if a seed is out of range, nothing is asked for, or an image contains NaN or infinity.
    """
    pictures: list[Image.Image] = []
    times = []
    for drawn, ms in batches(pipeline, prompts, seeds, steps, guidance_scale, batch, call, start):
        pictures += drawn
        times.append(ms)
    return Drawn(pictures, median(times))


def batches(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 1,
    guidance_scale: float | None = None,
    batch: int = 8,
    call: Mapping[str, Any] | None = None,
    start: Callable[[Sequence[torch.Generator]], Tensor] | None = None,
) -> Iterator[tuple[list[Image.Image], float]]:
    """Generate as `draw` does, and yield the images of each batch with its milliseconds per image."""
    check_request(prompts, seeds, steps, batch)
    arguments = {"num_inference_steps": steps, **family_call(pipeline, guidance_scale), **(call or {})}
    with progress("generating", len(prompts), quiet=len(prompts) <= batch) as bar:
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            begin = time.perf_counter()
            latents = {} if start is None else {"latents": start(generators)}
            full = explained_when_full(pipeline.device, lambda: f"generating {len(generators)} at once", WHEN_FULL)  # noqa: B023
            able = explain_run_errors(f"{type(pipeline).__name__} cannot generate")
            with full, able, _own_noise(pipeline.scheduler, generators), finite_decoding(pipeline.vae):
                drawn = pipeline(prompt=list(prompts[part]), generator=generators, **arguments, **latents).images
            yield drawn, 1000 * (time.perf_counter() - begin) / len(drawn)
            bar.advance(by=len(drawn))


def check_request(prompts: Sequence[str], seeds: Sequence[int], steps: int = 1, batch: int = 8) -> None:
    """Raise `WadiError` unless there are as many prompts as seeds, and all numbers are in range."""
    if not prompts or len(prompts) != len(seeds):
        raise WadiError(f"Received {len(prompts)} prompts and {len(seeds)} seeds. Expected at least one, and as many of each.")
    if batch < 1 or steps < 1:
        raise WadiError(f"batch is {batch} and steps is {steps}. Expected both at least 1.")
    _check_seeds(min(seeds), max(seeds))


def _check_seeds(first: int, last: int) -> None:
    if first < 0 or last >= SEEDS:
        raise WadiError(f"Seeds run from {first} to {last}. Expected whole numbers from 0 to 2^63 - 1.")


def median(values: Sequence[float]) -> float:
    """The middle value, the upper one of two; 0 of none."""
    return sorted(values)[len(values) // 2] if values else 0.0


def family_call(pipeline: Any, guidance_scale: float | None = None) -> dict[str, Any]:
    """Arguments with which a pipeline of a family generates at its own size and a guidance scale (None or 1 = no guidance).

    Raises:
        WadiError: if no family serves the pipeline and there is a scale: only the family knows how its pipeline takes it.
    """
    try:
        family(type(pipeline).__name__)
    except WadiError:
        if guidance_scale is not None:
            raise
        return {}  # one with a ControlNet, say: whoever made it gives them as `draw`'s call
    backbone = from_pipeline(pipeline)
    return backbone.call if guidance_scale is None else backbone.guided_call(guidance_scale)


@contextmanager
def _own_noise(scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Within the block a scheduler that adds noise takes it from the pictures' generators, also where a pipeline forgets to."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    scheduler.step = partial(scheduler.step, generator=list(generators))
    try:
        yield
    finally:
        del scheduler.step


def file_name(index: int, prompt: str, seed: int) -> str:
    """``00003-red-apple-7.png``: a name any file system takes, whatever the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{index:05d}-{words or 'prompt'}-{seed}.png"


@dataclass(frozen=True)
class Generated:
    """Files of a call of `generate`.

    Attributes:
        paths: one for each image, in the order of the prompts.
        kept: how many of them were there already.
        ms_per_image: median over batches; 0 if all were there.
    """

    paths: list[Path]
    kept: int
    ms_per_image: float


def planned(prompts: Sequence[str], seed: int, count: int) -> list[image_folder.PlannedImage]:
    """``count`` images of each prompt, with consecutive seeds, under names of their own in a folder.

    Raises:
        WadiError: if count or seed is out of range, or there is no prompt.
    """
    if not 1 <= count <= MOST_IMAGES:
        raise WadiError(f"count is {count}. Expected 1 to {MOST_IMAGES:,}.")
    if len(prompts) * count > MOST_IMAGES:
        raise WadiError(f"{len(prompts):,} prompts with count {count:,} are too many images. At most {MOST_IMAGES:,} are made.")
    if not prompts:
        raise WadiError("Received no prompt. Expected at least one.")
    _check_seeds(seed, seed + len(prompts) * count - 1)
    rows = enumerate(prompt for prompt in prompts for _ in range(count))
    return [image_folder.PlannedImage(file_name(i, prompt, seed + i), prompt, seed + i) for i, prompt in rows]


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    out: Path,
    seed: int = 0,
    count: int = 1,
    batch: int = 8,
    folder: bool = False,
    call: Mapping[str, Any] | None = None,
    start: Callable[[Sequence[torch.Generator]], Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Generated:
    """Generate ``count`` images of each prompt with consecutive seeds. Each batch is written as soon as it is there.

    With ``folder`` every image goes into ``out`` under a name of its own, with a manifest (`wadi.io.image_folder`); images that
    are there already, made with the same ``settings``, are kept. Otherwise ``out`` is the image, or for several a grid of them
    with the single ones beside it; these files are replaced. ``call`` and ``start`` are those of `draw`.

    Args:
        settings: everything that decides about the images besides prompt and seed, as JSON values.
        overwrite: with ``folder``, replace images that were made otherwise.
    Raises:
        WadiError: if count or seed is out of range, ``out`` cannot be written, or an image is there that was made otherwise.
    """
    images_of = planned(prompts, seed, count)
    if not folder:
        return _single(pipeline, images_of, out, batch, call, start)
    rows = image_folder.missing_images(out, images_of, settings or {}, overwrite)
    times, done = [], 0
    for pictures, ms in _batches_of(pipeline, [images_of[row] for row in rows], batch, call, start):
        part = [images_of[row] for row in rows[done : done + len(pictures)]]
        image_folder.write_images(out, part, [grids.encode_png(picture) for picture in pictures], settings or {})
        done += len(pictures)
        times.append(ms)
    return Generated([out / image.file for image in images_of], len(images_of) - len(rows), median(times))


def _single(
    pipeline: Any, wanted: Sequence[image_folder.PlannedImage], out: Path, batch: int, call: Any, start: Any
) -> Generated:
    """One image at ``out``; of several a grid there, and each under its seed."""
    paths = [out] if len(wanted) == 1 else [out.with_name(f"{out.stem}-{image.seed}{out.suffix}") for image in wanted]
    pictures: list[Image.Image] = []
    times = []
    for drawn, ms in _batches_of(pipeline, wanted, batch, call, start):
        for picture in drawn:
            grids.save_png(picture, paths[len(pictures)])
            pictures.append(picture)
        times.append(ms)
    if len(wanted) > 1:
        grids.save_png(grids.compose_grid([pictures], [""], scale=enlargement(pictures[0])), out)
    return Generated(paths, 0, median(times))


def _batches_of(
    pipeline: Any, wanted: Sequence[image_folder.PlannedImage], batch: int, call: Any, start: Any
) -> Iterator[tuple[list[Image.Image], float]]:
    if wanted:
        seeds = [image.seed for image in wanted]
        yield from batches(pipeline, [image.prompt for image in wanted], seeds, batch=batch, call=call, start=start)


def compare(
    student: Any,
    teacher: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    call: Mapping[str, Any] | None = None,
    batch: int = 8,
) -> tuple[Image.Image, float, float]:
    """Teacher in many steps above the student, from the same noise: ``(picture, teacher's ms, student's ms)`` per image.

    ``call`` is that of `draw`, for the student, who takes one step unless it says otherwise.
    """
    # First calls pay for set-up that later ones do not.
    draw(teacher, prompts[:1], seeds[:1])
    draw(student, prompts[:1], seeds[:1], call=call)
    slow = draw(teacher, prompts, seeds, steps, guidance_scale, batch)
    fast = draw(student, prompts, seeds, batch=batch, call=call)
    own = dict(call or {}).get("num_inference_steps", 1)
    labels = [
        f"teacher\n{steps} steps\n{slow.ms_per_image:.0f} ms",
        f"student\n{own} step{'s' * (own > 1)}\n{fast.ms_per_image:.0f} ms",
    ]
    picture = grids.compose_grid([slow.pictures, fast.pictures], labels, prompts, enlargement(slow.pictures[0]))
    return picture, slow.ms_per_image, fast.ms_per_image


def enlargement(picture: Image.Image) -> int:
    """Whole number that brings small pictures to about 128 pixels."""
    return max(1, 128 // picture.width)
