"""Names of metrics and speeds, as tables and reports print them. The keys are the names in result files."""

from __future__ import annotations

METRIC_LABELS = {
    "fid": "FID", "kid": "KID", "fd": "Frechet distance", "kd": "kernel distance", "clip": "CLIP score",
    "top1": "concept named (top-1)", "diversity": "same-prompt diversity", "fd-zoo": "Frechet distance, zoo-classifier",
}  # fmt: skip
DISTANCES = ("fid", "kid", "fd", "kd")
SPEED_LABELS = {
    "images_per_second": "images per second", "latency_p50_ms": "latency p50, ms", "latency_p95_ms": "latency p95, ms",
    "peak_memory_mib": "peak memory, MiB", "parameters": "parameters", "evaluations": "network evaluations per image",
}  # fmt: skip


def metric_label(name: str) -> str:
    """Return the heading of a metric. The name ``fd NETWORK`` gives 'Frechet distance, NETWORK'."""
    metric, _, network = name.partition(" ")
    return METRIC_LABELS.get(metric, metric) + (f", {network}" if network else "")


def lower_is_better(name: str) -> bool:
    """Return whether smaller values of a metric are better: whether it is a distance."""
    return name.split()[0].split("-")[0] in DISTANCES
