"""Sample grids: images of the same prompts and seeds, from the teacher once and from the student again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.distill import health
from wadi.io import grids
from wadi.io.progress import progress
from wadi.io.wording import counted
from wadi.sampling import decode_in_batches, few_steps, images_at_once, many_steps, noises

SHOWN_SEEDS = 2  # images per prompt in the grid; the diversity metric uses all
GENERATED_PIXELS = 2**22  # at once: 16 images of 512 x 512


@dataclass
class Validation:
    """The inputs of the sample grids and the teacher's images for them.

    Attributes:
        condition, z: one row per image; all images of one prompt are consecutive.
        noises: for the later steps of a student of several steps, one tensor like ``z`` for each.
        teacher, undistilled: the teacher's images in many steps and in one step, ``(prompts, seeds, 3, h, w)`` in [0, 1].
        teacher_ms: milliseconds per image of the teacher in many steps, decoding included.
    """

    prompts: tuple[str, ...]
    condition: Condition
    z: Tensor
    noises: list[Tensor]
    teacher: Tensor
    undistilled: Tensor
    teacher_ms: float
    teacher_steps: int


def generate_teacher_images(
    backbone: Backbone,
    prompts: tuple[str, ...],
    seeds: int,
    steps: int,
    guidance_scale: float,
    timesteps: Sequence[int],
    quiet: bool = False,
    between: Callable[[], None] | None = None,
) -> Validation:
    """Generate the teacher's images of ``prompts`` with the seeds ``0 .. seeds - 1``.

    Args:
        steps, guidance_scale: of the teacher's sampler.
        timesteps: where the student generates; the teacher also generates in one step from the first, for comparison.
        between: called before each step of the sampler and each batch; it may raise an exception to stop early.
    """
    device = next(backbone.network.parameters()).device
    z, *later = (noise.to(device) for noise in noises(backbone, list(range(seeds)) * len(prompts), len(timesteps)))
    encoded, null = backbone.encode(prompts), backbone.encode([""])
    rows = torch.arange(len(prompts), device=device).repeat_interleave(seeds)
    condition = encoded[rows]
    images, start = [], time.perf_counter()
    with roles.active(backbone.network, None), progress("teacher's grid", len(z), quiet=quiet) as bar:
        for part in torch.arange(len(z), device=device).split(images_at_once(backbone, GENERATED_PIXELS)):
            latents = many_steps(backbone, condition[part], null, z[part], steps, guidance_scale, between)
            images.append(decode_in_batches(backbone, latents))
            bar.advance(by=len(part))
    elapsed = time.perf_counter() - start
    shape = (len(prompts), seeds)
    undistilled = generate_few_steps(backbone, None, condition, [z], timesteps[:1], between)[0]
    return Validation(
        prompts=prompts,
        condition=condition,
        z=z,
        noises=later,
        teacher=torch.cat(images).unflatten(0, shape),
        undistilled=undistilled.unflatten(0, shape),
        teacher_ms=1000 * elapsed / len(z),
        teacher_steps=steps,
    )


@torch.no_grad()
def generate_few_steps(
    backbone: Backbone,
    role: str | None,
    condition: Condition,
    noises: Sequence[Tensor],
    timesteps: Sequence[int],
    between: Callable[[], None] | None = None,
) -> tuple[Tensor, float]:
    """Return images ``(rows, 3, h, w)`` that ``role`` generates at ``timesteps``, and milliseconds per image with decoding.

    Args:
        role: None = the teacher.
        noises: one for each timestep, ``(rows, C, H, W)``; the first is where generation starts.
        between: called before each batch; it may raise an exception to stop early.
    """
    start, images = time.perf_counter(), []
    with roles.active(backbone.network, role):
        rows = torch.arange(len(condition), device=noises[0].device)
        for part in rows.split(images_at_once(backbone, GENERATED_PIXELS)):
            if between is not None:
                between()
            z, *later = (noise[part] for noise in noises)
            images.append(decode_in_batches(backbone, few_steps(backbone, condition[part], z, timesteps, later)))
    return torch.cat(images), 1000 * (time.perf_counter() - start) / len(condition)


def validate_student(
    backbone: Backbone, validation: Validation, timesteps: Sequence[int], between: Callable[[], None] | None = None
) -> tuple[dict[str, float], grids.Image.Image]:
    """Generate the student's images; return their statistics and the sample grid.

    The statistics are diversity and contrast, compared with the teacher's, and the time per image.

    Args:
        between: called before each batch; it may raise an exception to stop early.
    """
    drawn = [validation.z, *validation.noises]
    images, student_ms = generate_few_steps(backbone, "student", validation.condition, drawn, timesteps, between)
    student = images.unflatten(0, validation.teacher.shape[:2])
    stats = {
        "diversity": health.pixel_diversity(student),
        "diversity_teacher": health.pixel_diversity(validation.teacher),
        "contrast_ratio": _ratio(health.pixel_contrast(student), health.pixel_contrast(validation.teacher)),
        "student_ms_per_image": student_ms,
        "teacher_ms_per_image": validation.teacher_ms,
    }
    stats["diversity_ratio"] = _ratio(stats["diversity"], stats["diversity_teacher"])
    defined = {name: value for name, value in stats.items() if value == value}  # one image per prompt has no diversity
    return defined, sample_grid(validation, student, len(timesteps))


def _ratio(student: float, teacher: float) -> float:
    """Return ``student / teacher``; NaN if the teacher's value is 0, as the contrast of blank images is."""
    return student / teacher if teacher else float("nan")


def sample_grid(validation: Validation, student: Tensor, steps: int = 1) -> grids.Image.Image:
    """Return the grid: rows of the teacher in many steps, the teacher in one, the student; a column per prompt."""
    shown = min(SHOWN_SEEDS, student.shape[1])
    blocks = (
        (f"teacher\n{validation.teacher_steps} steps", validation.teacher),
        ("teacher\n1 step", validation.undistilled),
        (f"student\n{counted(steps, 'step')}", student),
    )
    rows = [[grids.to_pil(column[seed]) for column in block] for _, block in blocks for seed in range(shown)]
    labels = [label for label, _ in blocks for _ in range(shown)]
    return grids.compose_grid(rows, labels, validation.prompts, grids.enlargement(rows[0][0]))
