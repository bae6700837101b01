"""Put the images of a student next to those of its teacher, with the time that each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from wadi.io import grids
from wadi.io.wording import counted
from wadi.pipelines.generate import Sampling, generate_images


@dataclass(frozen=True)
class Comparison:
    """A grid with the teacher's images above the student's, and the times per image in milliseconds."""

    image: Image.Image
    teacher_ms: float
    student_ms: float


def compare_with_teacher(
    student: Any,
    teacher: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    student_sampling: Sampling,
    teacher_sampling: Sampling,
) -> Comparison:
    """Generate the same prompts from the same seeds with ``teacher`` and ``student``.

    Raises:
        WadiError: as `generate_images`.
    """
    # The first call of a pipeline pays for set-up; it must not count.
    generate_images(teacher, prompts[:1], seeds[:1], replace(teacher_sampling, steps=1, guidance_scale=None))
    generate_images(student, prompts[:1], seeds[:1], student_sampling)
    slow = generate_images(teacher, prompts, seeds, teacher_sampling)
    fast = generate_images(student, prompts, seeds, student_sampling)
    steps = student_sampling.call.get("num_inference_steps", student_sampling.steps)
    labels = [
        f"teacher\n{teacher_sampling.steps} steps\n{slow.ms_per_image:.0f} ms",
        f"student\n{counted(steps, 'step')}\n{fast.ms_per_image:.0f} ms",
    ]
    grid = grids.compose_grid([slow.images, fast.images], labels, prompts, grids.enlargement(slow.images[0]))
    return Comparison(grid, slow.ms_per_image, fast.ms_per_image)
