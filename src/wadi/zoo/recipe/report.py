"""Progress of the recipe: a bar for people, one JSON object on each line for programs, and image grids."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from wadi.io.progress import Bar, progress

if TYPE_CHECKING:
    from wadi.zoo.recipe.state import Budget

LINE_EVERY = 30.0  # seconds of training that one line of the file sums up


class Log:
    """The mean loss, images per second and minutes of a stage. The bar counts seconds of training."""

    def __init__(self, path: Path, budget: Budget, bar: Bar) -> None:
        self.path, self.budget, self.bar = path, budget, bar
        self.losses: list[float] = []
        self.images, self.since = 0, time.monotonic()

    def step(self, loss: float, images: int) -> None:
        """Count one training step of ``images`` images."""
        self.losses.append(loss)
        self.images += images
        passed = time.monotonic() - self.since
        values = {"loss": sum(self.losses) / len(self.losses), "images_per_s": self.images / max(passed, 1e-9)}
        self.bar.advance(values, by=int(min(self.budget.elapsed, self.budget.seconds)) - self.bar.done)
        if passed >= LINE_EVERY:
            self.write(**values)
            self.losses, self.images, self.since = [], 0, time.monotonic()

    def write(self, **values: float) -> None:
        """Add a line to the file: ``values`` and the minutes trained so far."""
        line = {"minutes": self.budget.elapsed / 60, **values}
        with self.path.open("a") as file:
            file.write(json.dumps({key: round(value, 4) for key, value in line.items()}) + "\n")


@contextmanager
def log(path: Path, title: str, budget: Budget) -> Iterator[Log]:
    """Open a ``Log`` whose lines go to ``path`` and whose bar is called ``title``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress(f"{title} (s)", max(1, round(budget.seconds)), int(min(budget.elapsed, budget.seconds))) as bar:
        yield Log(path, budget, bar)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images ``(N, 3, H, W)`` in [0, 1] as one PNG with ``columns`` in each row. An incomplete last row is left out."""
    from PIL import Image

    from wadi.io.grids import save_png

    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = count // columns
    tiled = images[: rows * columns].reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (tiled.clamp(0, 1) * 255).round().byte().reshape(rows * height, columns * width, channels)
    save_png(Image.fromarray(pixels.cpu().numpy()), path)
