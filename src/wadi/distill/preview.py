"""Fixed prompts and seeds, drawn by the teacher once and by the student again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wadi import roles
from wadi.backbones import Backbone, Condition
from wadi.distill import health
from wadi.io import grids
from wadi.io.progress import progress
from wadi.sampling import decode_in_batches, many_steps, noise, one_step

SHOWN_SEEDS = 2  # per prompt in the grid; diversity uses all
SHOWN_WIDTH = 128  # pixels that a cell of the grid is enlarged to, at least
BATCH = 16


@dataclass
class Validation:
    """What the student's images are held against.

    Attributes:
        condition, z: one row per image, prompts outermost.
        teacher, undistilled: the teacher's images in many steps and in one, ``(prompts, seeds, 3, h, w)`` in [0, 1].
        teacher_ms: milliseconds per image of the many-step teacher, decoding included.
    """

    prompts: tuple[str, ...]
    condition: Condition
    z: Tensor
    teacher: Tensor
    undistilled: Tensor
    teacher_ms: float
    teacher_steps: int


def prepare(
    backbone: Backbone,
    prompts: tuple[str, ...],
    seeds: int,
    steps: int,
    guidance_scale: float,
    timestep: int,
    quiet: bool = False,
    between: Callable[[], None] | None = None,
) -> Validation:
    """Draw the teacher's images for ``prompts`` with seeds ``0 .. seeds - 1``; the network must hold the latents' device.

    Args:
        between: called before each step of the sampler and each batch; may raise to end early.
    """
    device = next(backbone.network.parameters()).device
    z = noise(backbone.latent_shape, list(range(seeds)) * len(prompts)).to(device)
    encoded, null = backbone.encode(prompts), backbone.encode([""])
    rows = torch.arange(len(prompts), device=device).repeat_interleave(seeds)
    condition = encoded[rows]
    many, start = [], time.perf_counter()
    with roles.active(backbone.network, None), progress("teacher's grid", len(z), quiet=quiet) as bar:
        for part in torch.arange(len(z), device=device).split(BATCH):
            latents = many_steps(backbone, condition[part], null, z[part], steps, guidance_scale, between)
            many.append(decode_in_batches(backbone, latents))
            bar.advance(by=len(part))
    elapsed = time.perf_counter() - start
    shape = (len(prompts), seeds)
    once = draw_one_step(backbone, None, condition, z, timestep, between)[0]
    return Validation(
        prompts,
        condition,
        z,
        torch.cat(many).unflatten(0, shape),
        once.unflatten(0, shape),
        1000 * elapsed / len(z),
        steps,
    )


@torch.no_grad()
def draw_one_step(
    backbone: Backbone,
    role: str | None,
    condition: Condition,
    z: Tensor,
    timestep: int,
    between: Callable[[], None] | None = None,
) -> tuple[Tensor, float]:
    """One-step images ``(rows, 3, h, w)`` in ``role``, and milliseconds per image, decoding included.

    Args:
        between: called before each batch; may raise to end early.
    """
    start, drawn = time.perf_counter(), []
    with roles.active(backbone.network, role):
        for part in torch.arange(len(z), device=z.device).split(BATCH):
            if between is not None:
                between()
            drawn.append(decode_in_batches(backbone, one_step(backbone, condition[part], z[part], timestep)))
    return torch.cat(drawn), 1000 * (time.perf_counter() - start) / len(z)


def validate(
    backbone: Backbone, validation: Validation, timestep: int, between: Callable[[], None] | None = None
) -> tuple[dict[str, float], grids.Image.Image]:
    """The student's grid; before it its diversity and contrast beside the teacher's, and its time per image.

    Args:
        between: called before each batch; may raise to end early.
    """
    drawn, student_ms = draw_one_step(backbone, "student", validation.condition, validation.z, timestep, between)
    student = drawn.unflatten(0, validation.teacher.shape[:2])
    stats = {
        "diversity": health.diversity(student),
        "diversity_teacher": health.diversity(validation.teacher),
        "contrast_ratio": _share(health.contrast(student), health.contrast(validation.teacher)),
        "student_ms_per_image": student_ms,
        "teacher_ms_per_image": validation.teacher_ms,
    }
    stats["diversity_ratio"] = _share(stats["diversity"], stats["diversity_teacher"])
    told = {name: value for name, value in stats.items() if value == value}  # one seed has no diversity
    return told, grid(validation, student)


def _share(student: float, teacher: float) -> float:
    """Ratio to the teacher's figure; not a number where a teacher of blank pictures has none."""
    return student / teacher if teacher else float("nan")


def grid(validation: Validation, student: Tensor) -> grids.Image.Image:
    """Teacher in many steps, teacher in one, student in one; a column per prompt."""
    shown = min(SHOWN_SEEDS, student.shape[1])
    blocks = (
        (f"teacher\n{validation.teacher_steps} steps", validation.teacher),
        ("teacher\n1 step", validation.undistilled),
        ("student\n1 step", student),
    )
    rows = [[grids.to_pil(column[seed]) for column in block] for _, block in blocks for seed in range(shown)]
    labels = [label for label, _ in blocks for _ in range(shown)]
    scale = max(1, SHOWN_WIDTH // student.shape[-1])
    return grids.compose_grid(rows, labels, validation.prompts, scale)
