"""What the examples have in common: drawing, tables that go into pages, and what they were made on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi.io.files import write_whole
from wadi.pipelines.generate import draw


def drawer(pipeline: Any, steps: int = 1, guidance: float | None = None) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    """A pipeline as a function from prompts and seeds to pictures ``(B, 3, h, w)`` in [0, 1]."""

    def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        drawn = draw(pipeline, prompts, seeds, steps, guidance, batch=64).pictures
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2) / 255

    return pictures


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rewrite(page: Path, name: str, text: str) -> None:
    """Print ``text``, and put it between ``<!-- name -->`` and ``<!-- /name -->`` of ``page``, if there is such a place."""
    print(text)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    if begin in content and end in content:
        before, rest = content.split(begin, 1)
        after = rest.split(end, 1)[1]
        write_whole(page, f"{before}{begin}\n{text}\n{end}{after}".encode())


def small(picture: Image.Image) -> Image.Image:
    """A picture in 128 colours, undithered: a third of the bytes as PNG."""
    return picture.quantize(128, dither=Image.Dither.NONE)


def machine() -> str:
    """Processor, threads and the versions that matter."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    threads = torch.get_num_threads()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    return f"{names[0] if names else platform.processor()}, {threads} thread{'s' * (threads > 1)}; {packages}."
