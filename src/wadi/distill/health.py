"""Is the run well? The distillation loss does not say, so these do.

Pure functions on what a step computed, and the warnings drawn from them, each with what to try.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wadi.lorad.angles import layer_angles

BUCKETS = 4  # of timesteps, in quarters of the schedule
LOW_DIVERSITY = 0.5  # same-prompt diversity below this share of the teacher's is called a collapse
WINDOW = 100  # steps that make up "the last ones"
FAR = 3  # teacher and fake model that many times as far apart as in the window before are called a divergence
LOW_CONTRAST = 0.6  # likewise for the standard deviation over an image's pixels


def distance_sums(x0_real: Tensor, x0_fake: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """RMS distances of the two predicted images, ``(B, ...)``: their sum and number by quarter of the schedule, ``(2, 4)``."""
    distance = (x0_real - x0_fake).flatten(1).square().mean(1).sqrt()
    bucket = (t.float() * BUCKETS / num_timesteps).long().clamp(0, BUCKETS - 1)
    both = torch.stack([distance, torch.ones_like(distance)])
    return torch.zeros(2, BUCKETS, device=distance.device).index_add(1, bucket, both)


def distance_by_timestep(sums: Tensor) -> dict[str, float]:
    """Mean distance by quarter of the schedule from `distance_sums`, added up as one likes; empty quarters are left out."""
    pairs = zip(*sums.tolist(), strict=True)
    return {f"teacher_fake_distance_q{i + 1}": total / count for i, (total, count) in enumerate(pairs) if count}


def angle_stats(network: nn.Module, role: str) -> dict[str, float]:
    """Return RMS and largest absolute angle of a role over all layers, in radians, and the share above 1e-3.

    Nothing if the role's adapter is of another method than LoRaD.
    """
    count, sums, largest = 0, [], []
    for _, theta in layer_angles(network, role):
        magnitude = theta.abs()
        sums.append(torch.stack([magnitude.square().sum(), (magnitude > 1e-3).sum()]))
        largest.append(magnitude.max())
        count += theta.numel()
    if not count:
        return {}
    # one transfer for all layers; float64 on the CPU, as Apple's GPUs have none
    each = torch.cat([torch.stack(sums), torch.stack(largest).unsqueeze(1)], 1).cpu().double()
    (square, above), most = each[:, :2].sum(0).tolist(), float(each[:, 2].max())
    return {
        f"{role}_angle_rms": (square / count) ** 0.5,
        f"{role}_angle_max": most,
        f"{role}_angle_share_above_1e-3": above / count,
    }


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held, in MiB: torch's on an accelerator, all of it on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # a system that does not count it
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def diversity(images: Tensor) -> float:
    """Mean pairwise RMS distance among images of one prompt, averaged over prompts. ``(prompts, seeds, 3, h, w)`` in [0, 1]."""
    seeds = images.shape[1]
    if seeds < 2:
        return float("nan")
    flat = images.flatten(2)
    distance = torch.cdist(flat, flat) / flat.shape[-1] ** 0.5
    return float(distance.sum((1, 2)).mean() / (seeds * (seeds - 1)))


def contrast(images: Tensor) -> float:
    """Standard deviation over the pixels and channels of an image, averaged over images ``(..., 3, h, w)``."""
    return float(images.flatten(-3).std(-1).mean())


def _mean_distance(line: Mapping[str, float]) -> float | None:
    found = [value for name, value in line.items() if name.startswith("teacher_fake_distance")]
    return sum(found) / len(found) if found else None


def warnings(stats: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> list[str]:
    """What looks wrong in the newest line of the statistics, each with what to try; empty when nothing does.

    Args:
        history: earlier lines, oldest first.
    """
    found = []
    if stats.get("diversity_ratio", 1.0) < LOW_DIVERSITY:
        found.append(
            f"Same-prompt diversity is {stats['diversity_ratio']:.0%} of the teacher's: it is collapsing onto few images. "
            "Try a lower student.lr, more fake.updates, a lower guidance_scale, or warm_start with a weight that is kept."
        )
    if stats.get("contrast_ratio", 1.0) < LOW_CONTRAST:
        found.append(
            f"Contrast is {stats['contrast_ratio']:.0%} of the teacher's: images are washing out. Try a lower fake.lr or "
            "student.lr, and check student.timestep."
        )
    if stats.get("contrast_ratio", 1.0) > 1 / LOW_CONTRAST:
        found.append(
            f"Contrast is {stats['contrast_ratio']:.0%} of the teacher's: images are over-saturated. "
            "Try a lower guidance_scale."
        )
    if stats.get("student_angle_max", 0.0) > 3.2:
        found.append(
            f"The student's largest angle is {stats['student_angle_max']:.1f} rad, past half a turn: rotations wrap around. "
            "Try a lower student.lr."
        )
    before = history[-WINDOW].get("skipped", 0) if len(history) >= WINDOW else 0
    lost = stats.get("skipped", 0) - before
    if lost > WINDOW / 10:
        found.append(
            f"{lost:.0f} of the last steps were left out: a gradient was not finite. Try dtype bfloat16 or float32, a lower "
            "student.lr or fake.lr, or an earlier student.timestep."
        )
    distances = [_mean_distance(line) for line in (*history[-2 * WINDOW :], stats)]
    far = [value for value in distances[-WINDOW:] if value is not None]
    near = [value for value in distances[:-WINDOW] if value is not None]
    if len(far) >= WINDOW // 2 and len(near) >= WINDOW // 2 and sum(far) / len(far) > FAR * sum(near) / len(near):
        found.append(
            f"Teacher and fake model are {FAR} times as far apart as before: the student is diverging. Try a lower student.lr, "
            "more fake.updates, or a lower guidance_scale."
        )
    recent = [line["loss_fake"] for line in history[-100:] if "loss_fake" in line]
    older = [line["loss_fake"] for line in history[-400:-200] if "loss_fake" in line]
    if len(recent) >= 100 and len(older) >= 100 and sum(recent) / len(recent) > 2 * sum(older) / len(older):
        found.append(
            "The fake model's loss has doubled over the last steps: it is losing track of the student. Try more fake.updates, "
            "a lower fake.lr, or a lower student.lr."
        )
    return found
