"""What is exported: a run, an adapter or a merged pipeline, with the prompts that check the export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wadi import roles
from wadi.backbones import Backbone, from_pipeline
from wadi.distill import config_files
from wadi.errors import WadiError
from wadi.io.regular import exists, read_text
from wadi.pipelines.generate import Sampling, generate_images
from wadi.pipelines.load import is_export, load, locate_adapter, open_student
from wadi.prompts.reading import open_prompts
from wadi.zoo.paths import NAME, embedded_path
from wadi.zoo.prompts import fixed_prompts

# Prompts for students of teachers that are not ours, if neither the run nor the user names some.
PROMPTS = (
    "a photo of a red apple on a wooden table",
    "a portrait of an old sailor, oil painting",
    "a mountain lake at sunrise",
    "a street in the rain at night, neon lights",
)
BATCH = 4
MOST_PROMPTS = 64
OTHER_SEEDS = 1_000_000


@dataclass(frozen=True)
class Source:
    """The student to export.

    Attributes:
        run: folder of the run, or of a merged pipeline; None = the embedded student, or ``adapter``.
        adapter: folder of an adapter, in place of ``run``.
        teacher: pipeline folder or Hub id; None = the one that the student names.
        dtype: of the exported weights.
        device: where to compute.
        prompts_file: file with the prompts of the check; None = those of the run.
        images: number of images of the check.
        base: name of the teacher in the exported files, such as its Hub id; None = `public_name`.
        licence: of the teacher; None = what its card says.
    """

    run: str | None = None
    adapter: str | None = None
    teacher: str | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    prompts_file: str | None = None
    images: int = 4
    base: str | None = None
    licence: str | None = None

    @property
    def is_merged(self) -> bool:
        """Whether it is a pipeline with merged weights, without an adapter."""
        return self.adapter is None and is_export(self.run)

    def locate(self) -> tuple[Path, str]:
        """Return the folder of the adapter, and the path or Hub id of the teacher.

        Raises:
            WadiError: if there is no adapter, or no teacher.
        """
        return locate_adapter(self.run, self.adapter, self.teacher)

    @property
    def teacher_source(self) -> str | None:
        """The path or Hub id of the teacher; None for a merged pipeline without ``teacher``."""
        return self.teacher if self.is_merged else self.locate()[1]

    def pipeline(self, dtype: torch.dtype | None = None) -> Any:
        """Return the student's pipeline with merged weights, as `wadi.load` does."""
        teacher = None if self.is_merged else self.teacher
        return load(self.run, adapter=self.adapter, teacher=teacher, dtype=dtype or self.dtype, device=self.device)

    def attached(self) -> tuple[Backbone, roles.About]:
        """Return the backbone of the teacher with the adapter ``student`` on it, not merged.

        Raises:
            WadiError: as `wadi.load`, or if there is no adapter.
        """
        return open_student(self.run, adapter=self.adapter, teacher=self.teacher, dtype=self.dtype, device=self.device)

    def requests(self) -> tuple[list[str], list[int]]:
        """Return the prompts and seeds of the check: one seed after the other, and the prompts in turn."""
        prompts = self._prompts()
        return [prompts[i % len(prompts)] for i in range(self.images)], list(range(self.images))

    def other_requests(self, count: int) -> tuple[list[str], list[int]]:
        """Return ``count`` prompts and seeds for other images than those of the check, from the same list of prompts."""
        prompts = self._prompts()
        return [prompts[-1 - i % len(prompts)] for i in range(count)], [OTHER_SEEDS + i for i in range(count)]

    def _prompts(self) -> list[str]:
        if self.prompts_file is not None:
            return list(open_prompts(self.prompts_file, limit=MOST_PROMPTS))
        if named := self.settings().get("sample_prompts"):
            return [str(prompt) for prompt in named]
        return fixed_prompts() if self.base_name == NAME else list(PROMPTS)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run; empty for anything else."""
        file = Path(self.run or "") / "config.yaml"
        return config_files.read_settings(file) if self.run is not None and file.is_file() else {}

    @property
    def base_name(self) -> str:
        """Name of the teacher in the exported files."""
        return self.base or public_name(self.teacher_source or str(self.run))

    def draw(
        self, pipeline: Any, call: dict[str, Any], steps: int, requests: tuple[list[str], list[int]] | None = None
    ) -> list[Image.Image]:
        """Return the images that ``pipeline`` generates for ``requests`` (None: those of the check), called with ``call``."""
        return generate_images(pipeline, *(requests or self.requests()), Sampling(steps, batch=BATCH, call=call)).images


def plain_call(pipeline: Any) -> tuple[dict[str, Any], int]:
    """Return the arguments of a student's call, and its number of steps."""
    backbone = from_pipeline(pipeline)
    return backbone.call, len(backbone.student_timesteps)


def public_name(source: str) -> str:
    """Return the Hub id of a teacher, or only the name of its folder: a path says who made an export and where."""
    place = source.partition("?variant=")[0]
    if Path(place) == embedded_path("teacher"):
        return NAME
    return Path(place).resolve().name if exists(place) else place


def licence_of(source: str | None) -> str | None:
    """Return the licence that the card of a teacher names; None if it has no card, or the card does not say."""
    if source is None:
        return None
    if Path(source) == embedded_path("teacher"):
        return "apache-2.0"
    card = Path(source) / "README.md"
    if not card.is_file():
        return None
    try:
        front = re.match(r"---\n(.*?)\n---", read_text(card, limit=1 << 20), re.DOTALL)
    except WadiError:
        return None
    found = re.search(r"^license:\s*[\"']?([\w.+-]{1,80})", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
