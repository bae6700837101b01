"""The metrics by name, with the network and the images that each needs, and the options of a measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from wadi.metrics.features import Extractor

# Raise this number when a definition changes, here or in a resize filter. Older results are then not comparable, and cached
# features are not reused.
MEASURE = 2
KID_SUBSETS, KID_SIZE = 100, 1000
SPREAD = "influence of each image"  # how the standard deviations are computed; see wadi.metrics.spread


@dataclass(frozen=True)
class Metric:
    """The requirements of a metric: a network, perhaps a reference, perhaps prompts, and a number of images.

    Attributes:
        least: smallest number of images.
    """

    network: str
    reference: bool = False
    prompts: bool = False
    least: int = 2


METRICS = {
    "fid": Metric("inception", reference=True),
    "kid": Metric("inception", reference=True, least=4),
    "fd": Metric("features", reference=True),
    "kd": Metric("features", reference=True, least=4),
    "pr": Metric("features", reference=True),
    "diversity": Metric("features"),
    "fd-zoo": Metric("zoo", reference=True),
    "top1": Metric("zoo"),
    "clip": Metric("clip", prompts=True),
    "hpsv2": Metric("hpsv2", prompts=True),
    "imagereward": Metric("imagereward", prompts=True),
    "pickscore": Metric("pickscore", prompts=True),
    "aesthetic": Metric("aesthetic"),
}
EXTRACTORS = ("inception", "features", "zoo")


@dataclass(frozen=True)
class Options:
    """The options of a measurement.

    Args:
        features: network of ``fd``, ``kd``, ``pr`` and ``diversity``: 'embedded', 'inception', 'dinov2', 'dinov2:NAME' or
            'zoo', or an extractor.
        resize: filter between the images and a feature network: see `wadi.metrics.resize`.
        inception: the TorchScript file; None = in the cache folder.
        download: whether to download that file if it is missing.
        weights: paths or Hub ids of the scorers' weights, by `wadi.evaluate.metric_networks.WEIGHTS`.
        k: number of nearest neighbours.
        spread: whether to compute standard deviations.
        seed: of the subsets of kernel distances, and of the halves that correct the spread of Frechet distances.
        batch: images in a call of a network.
        cache: folder of cached features; None = in the user's cache folder.
    """

    features: str | Extractor = "embedded"
    resize: str = "clean"
    inception: str | None = None
    download: bool = False
    weights: dict[str, str] = field(default_factory=dict)
    k: int = 3
    spread: bool = True
    seed: int = 0
    batch: int = 32
    device: str = "cpu"
    cache: Path | None = None


def kid_size(count: int, reference: int) -> int:
    """Return the number of images in a subset of a kernel distance: 1000 as published, at most half of the smaller set."""
    return min(KID_SIZE, min(count, reference) // 2)
