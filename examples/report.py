"""What the examples share: generating images, timing, tables that go into pages, and the machine they ran on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi.io.markdown import write_between_markers
from wadi.io.wording import counted
from wadi.pipelines.generate import Sampling, generate_images

SEED_STEP = 10_000  # between the seeds of two repetitions
TIMED = 20  # images that the time is the median of

# From prompts and seeds to images (B, 3, h, w) in [0, 1].
Drawer = Callable[[Sequence[str], Sequence[int]], Tensor]


def drawer(pipeline: Any, steps: int = 1, guidance: float | None = None) -> Drawer:
    """Return a pipeline as a function from prompts and seeds to images ``(B, 3, h, w)`` in [0, 1]."""
    return lambda prompts, seeds: tensor(generate_images(pipeline, prompts, seeds, Sampling(steps, guidance, batch=64)).images)


def tensor(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as a tensor ``(B, 3, h, w)`` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def latency(draw: Callable[[Sequence[str], Sequence[int]], Any], prompts: Sequence[str]) -> tuple[float, float]:
    """Return the median milliseconds of one image generated alone, and half the distance of the quartiles."""
    draw(prompts[:1], [0])  # the first call also sets things up
    times = []
    for i, prompt in enumerate(prompts[:TIMED]):
        start = time.perf_counter()
        draw([prompt], [i])
        times.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rewrite(page: Path, name: str, text: str) -> None:
    """Print ``text``, and put it between the lines ``<!-- name -->`` and ``<!-- /name -->`` of ``page``."""
    print(text)
    write_between_markers(page, f"<!-- {name} -->", f"<!-- /{name} -->", text)


def small(image: Image.Image) -> Image.Image:
    """Return an image in 128 colours without dithering, which takes a third of the bytes as PNG."""
    return image.quantize(128, dither=Image.Dither.NONE)


def machine() -> str:
    """Return one line about the processor, the threads and the versions of the libraries."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return f"{names[0] if names else platform.processor()}, {counted(torch.get_num_threads(), 'thread')}; {packages}."
