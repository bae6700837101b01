"""Signs of a healthy run: statistics of each step, and warnings with advice. The student's loss says nothing about quality."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wadi import roles
from wadi.lorad.angles import layer_angles
from wadi.roles.change import mean_changes

BUCKETS = 4  # the distances are averaged over quarters of the schedule
LOW_DIVERSITY = 0.5  # warn if the student's diversity is below this share of the teacher's
LOW_CONTRAST = 0.6  # warn if the ratio of the contrasts is below this, or above its inverse
HALF_TURN = 3.2  # radians
WINDOW = 100  # number of steps that count as recent
FAR = 3  # warn if teacher and fake model are this many times as far apart as in the window before

Stats = Mapping[str, float]


def distance_sums(x0_real: Tensor, x0_fake: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """Return the sum and the number of RMS distances by quarter of the schedule, ``(2, 4)``. Results of batches can be added.

    Args:
        x0_real, x0_fake: images that teacher and fake model predict, ``(B, ...)``.
        t: their timesteps, ``(B,)``, below ``num_timesteps``.
    """
    distance = (x0_real - x0_fake).flatten(1).square().mean(1).sqrt()
    bucket = (t.float() * BUCKETS / num_timesteps).long().clamp(0, BUCKETS - 1)
    both = torch.stack([distance, torch.ones_like(distance)])
    return torch.zeros(2, BUCKETS, device=distance.device).index_add(1, bucket, both)


def distance_by_timestep(sums: Tensor) -> dict[str, float]:
    """Return the mean distance by quarter of the schedule from `distance_sums`. Quarters without samples are left out."""
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


def weight_change_stats(network: nn.Module, role: str) -> dict[str, float]:
    """Return how far a role's weights are from the teacher's, for any adapter: means over rows, then over layers.

    `wadi.roles.change` has the definitions. It takes a merge of every layer, so it is for some steps only. Communicates, if the
    network is sharded. Nothing if no layer has the adapter.
    """
    changes = [mean_changes(W, S) for _, W, S in roles.merged_weights(network, role)]
    if not changes:
        return {}
    norm, direction = torch.stack(changes).cpu().double().mean(0).tolist()  # one transfer for all layers
    return {f"{role}_norm_change": norm, f"{role}_direction_change": direction}


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: torch's allocations on CUDA, all of the process on other devices.

    NaN on a system that does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not a Unix system
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def pixel_diversity(images: Tensor) -> float:
    """Return the mean pairwise RMS distance of images of one prompt, averaged over prompts; NaN if there is one seed.

    Args:
        images: ``(prompts, seeds, 3, h, w)`` in [0, 1].
    """
    seeds = images.shape[1]
    if seeds < 2:
        return float("nan")
    flat = images.flatten(2)
    distance = torch.cdist(flat, flat) / flat.shape[-1] ** 0.5
    return float(distance.sum((1, 2)).mean() / (seeds * (seeds - 1)))


def pixel_contrast(images: Tensor) -> float:
    """Return the standard deviation over pixels and channels of an image, averaged over images ``(..., 3, h, w)``."""
    return float(images.flatten(-3).std(-1).mean())


# --- warnings ---------------------------------------------------------------------------------------------------------------


def warnings(stats: Stats, history: Sequence[Stats]) -> list[str]:
    """Return a warning for each sign of trouble in the newest statistics, with advice; empty if there is none.

    Args:
        stats: statistics of the newest step.
        history: statistics of the steps before, oldest first.
    """
    checks = (_low_diversity, _wrong_contrast, _large_angles, _skipped_steps, _divergence, _rising_fake_loss)
    return [warning for check in checks if (warning := check(stats, history))]


def _low_diversity(stats: Stats, history: Sequence[Stats]) -> str | None:
    ratio = stats.get("diversity_ratio", 1.0)
    if not ratio < LOW_DIVERSITY:
        return None
    return (
        f"Images of the same prompt are too similar: their diversity is {ratio:.0%} of the teacher's. "
        "Try a lower student.lr, more fake.updates, a lower guidance_scale, or a warm start with warm_start.weight above 0."
    )


def _wrong_contrast(stats: Stats, history: Sequence[Stats]) -> str | None:
    ratio = stats.get("contrast_ratio", 1.0)
    if ratio < LOW_CONTRAST:
        return (
            f"Images are washed out: their contrast is {ratio:.0%} of the teacher's. "
            "Try a lower fake.lr or student.lr, and check student.timesteps."
        )
    if ratio > 1 / LOW_CONTRAST:
        return f"Images are over-saturated: their contrast is {ratio:.0%} of the teacher's. Try a lower guidance_scale."
    return None


def _large_angles(stats: Stats, history: Sequence[Stats]) -> str | None:
    largest = stats.get("student_angle_max", 0.0)
    if not largest > HALF_TURN:
        return None
    return f"The student's largest angle is {largest:.1f} rad, more than half a turn. Try a lower student.lr."


def _skipped_steps(stats: Stats, history: Sequence[Stats]) -> str | None:
    before = history[-WINDOW].get("skipped", 0) if len(history) >= WINDOW else 0
    skipped = stats.get("skipped", 0) - before
    if not skipped > WINDOW / 10:
        return None
    return (
        f"{skipped:.0f} updates of the last {WINDOW} steps were skipped, because a gradient was not finite. "
        "Try dtype bfloat16 or float32, a lower student.lr or fake.lr, or an earlier student.timesteps."
    )


def _divergence(stats: Stats, history: Sequence[Stats]) -> str | None:
    distances = [_mean_distance(line) for line in (*history[-2 * WINDOW :], stats)]
    recent = [value for value in distances[-WINDOW:] if value is not None]
    earlier = [value for value in distances[:-WINDOW] if value is not None]
    if len(recent) < WINDOW // 2 or len(earlier) < WINDOW // 2 or not _mean(recent) > FAR * _mean(earlier):
        return None
    return (
        f"The student diverges: the distance between teacher and fake model has grown more than {FAR}-fold in {WINDOW} steps. "
        "Try a lower student.lr, more fake.updates, or a lower guidance_scale."
    )


def _rising_fake_loss(stats: Stats, history: Sequence[Stats]) -> str | None:
    recent = [line["loss_fake"] for line in history[-100:] if "loss_fake" in line]
    earlier = [line["loss_fake"] for line in history[-400:-200] if "loss_fake" in line]
    if len(recent) < 100 or len(earlier) < 100 or not _mean(recent) > 2 * _mean(earlier):
        return None
    return (
        "The fake model no longer follows the student: its loss has doubled. "
        "Try more fake.updates, a lower fake.lr, or a lower student.lr."
    )


def _mean_distance(line: Stats) -> float | None:
    """Return the mean over the quarters of the schedule; None if the step has no distances."""
    distances = [value for name, value in line.items() if name.startswith("teacher_fake_distance")]
    return _mean(distances) if distances else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
