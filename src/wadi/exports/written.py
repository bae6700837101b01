"""What a format returns after it wrote its files, and how its images differ from the student's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Written:
    """Files in a temporary folder that were not yet read back.

    Attributes:
        title: first line of the card.
        reference: images of the student itself.
        read: loads the files with their own reader and generates the same prompts and seeds.
        reader: name of that reader.
        code: Python lines that load the export; ``FOLDER`` is its folder, ``TEACHER`` the teacher if it needs one.
        sections: further sections of the card, Markdown.
        data: what the format stores in ``export.json``.
        summary: what the command prints after the name of the folder.
        library: of the model card.
        tags: further ones of the model card.
    """

    title: str
    reference: list[Image.Image]
    read: Callable[[], list[Image.Image]]
    reader: str
    code: str
    summary: str
    sections: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    library: str = "diffusers"
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The difference of two lists of images, in steps of 8-bit channels.

    Attributes:
        mean, largest: of the absolute differences.
        equal: number of images without any difference.
        images: number of images.
    """

    mean: float
    largest: int
    equal: int
    images: int

    def __str__(self) -> str:
        if self.equal == self.images:
            return f"all {self.images} images are equal, byte for byte"
        return f"mean {self.mean:.3g} and at most {self.largest} of 255, {self.equal} of {self.images} images equal"


def difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> Difference:
    """Return how two lists of images of the same sizes differ."""
    changes = [
        np.abs(np.asarray(a.convert("RGB")).astype(int) - np.asarray(b.convert("RGB")).astype(int))
        for a, b in zip(one, other, strict=True)
    ]
    mean = float(np.mean([change.mean() for change in changes]))
    return Difference(mean, max(int(c.max()) for c in changes), sum(not c.any() for c in changes), len(changes))
