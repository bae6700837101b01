"""Metrics by name: which networks each needs, one pass over the pictures for all of them, then the numbers with their spread.

Spread: the standard deviation of a number if the images were generated again from other seeds, with prompts and reference fixed
(`wadi.metrics.spread`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi.errors import WadiError
from wadi.evaluate.networks import feature_network, scorer
from wadi.evaluate.pictures import FITTING, batches
from wadi.evaluate.result import Number
from wadi.io.user_cache import cache_folder
from wadi.metrics import frechet
from wadi.metrics.cache import FeatureCache
from wadi.metrics.diversity import diversity_spread, same_prompt_diversity
from wadi.metrics.features import Extractor
from wadi.metrics.kernel import kernel_distance
from wadi.metrics.neighbours import membership, recall_spread
from wadi.metrics.spread import Z, nearest_prompts, spread_from_influence

# Raised when a definition changes, here or in a resize filter: older numbers are then not comparable, nor features reused.
MEASURE = 2
KID_SUBSETS, KID_SIZE = 100, 1000
SPREAD = "influence of each image"  # how the standard deviations are found; see wadi.metrics.spread


@dataclass(frozen=True)
class Metric:
    """What a name on the command line asks for: a network, perhaps a reference, perhaps prompts, so many pictures."""

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
    """How to measure.

    Args:
        features: network of ``fd``, ``kd``, ``pr`` and ``diversity``: 'embedded', 'inception', 'dinov2', 'dinov2:NAME' or
            'zoo', or an extractor.
        resize: filter between the pictures and a feature network: see `wadi.metrics.resize`.
        inception: the TorchScript file; None = in the cache folder.
        download: fetch that file if it is missing.
        weights: places of the scorers' weights, by `wadi.evaluate.networks.WEIGHTS`.
        k: of the nearest neighbours.
        spread: False = the numbers alone.
        seed: of the subsets of kernel distances, and of the halves that correct the spread of Frechet distances.
        batch: pictures per network call.
        cache: folder of remembered features; None = the user's.
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


@dataclass(frozen=True)
class Seen:
    """What the networks made of a set of pictures: features ``(n, d)`` and scores ``(n,)``, by network."""

    count: int
    features: dict[str, Tensor]
    scores: dict[str, Tensor]


class Judge:
    """The networks that some metrics need, loaded once.

    Args:
        load: False = none is loaded, and it can only `check`: for processes that do nothing but draw.
    Raises:
        WadiError: on an unknown metric, or weights that are not on this machine.
    """

    def __init__(self, metrics: Sequence[str], options: Options | None = None, load: bool = True) -> None:
        self.metrics, self.options = list(dict.fromkeys(metrics)), options or Options()
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise WadiError(f"There is no metric {unknown[0]!r}. Expected some of {', '.join(METRICS)}.")
        if not self.metrics:
            raise WadiError(f"No metric is asked for. Expected some of {', '.join(METRICS)}.")
        if self.options.batch < 1 or self.options.k < 1:
            raise WadiError(f"batch is {self.options.batch} and k is {self.options.k}. Expected at least 1 of each.")
        needed = dict.fromkeys(METRICS[name].network for name in self.metrics if load)
        of = self.options
        self.extractors = {name: self._extractor(name) for name in needed if name in EXTRACTORS}
        cache = (of.cache or cache_folder() / "features") / f"measure-{MEASURE}"
        self.caches = {name: FeatureCache(network, cache) for name, network in self.extractors.items()}
        self.scorers = {name: scorer(name, of.weights, of.device) for name in needed if name not in EXTRACTORS}
        self._gaussians: dict[str, tuple[Tensor, frechet.Gaussian]] = {}  # of references, by network
        self.classifier: Any = None
        if "top1" in self.metrics and load:
            from wadi.zoo import load_classifier

            self.classifier = load_classifier()

    @property
    def comparing(self) -> list[str]:
        """The networks by which pictures are held against a reference."""
        return list(dict.fromkeys(METRICS[name].network for name in self.metrics if METRICS[name].reference))

    @property
    def reads_prompts(self) -> bool:
        """Whether any number depends on which prompt is whose."""
        return any(METRICS[name].prompts or name == "diversity" for name in self.metrics)

    def check(self, count: int, prompts: bool = True, reference: bool = True) -> None:
        """Raise `WadiError` if a metric needs more pictures, prompts, or a reference: before any network runs."""
        for name in self.metrics:
            self._enough(name, count, "pictures")
            if METRICS[name].prompts and not prompts:
                raise WadiError(f"Metric {name!r} needs the prompt of each picture. Expected --prompts, one line a picture.")
            if METRICS[name].reference and not reference:
                raise WadiError(f"Metric {name!r} needs a reference. Expected --reference: a folder of pictures.")

    def check_reference(self, count: int) -> None:
        """Raise `WadiError` if a metric needs more pictures to hold others against."""
        for name in self.metrics:
            if METRICS[name].reference:
                self._enough(name, count, "reference pictures")

    def _enough(self, name: str, count: int, what: str) -> None:
        least = self.options.k + 1 if name == "pr" else METRICS[name].least
        if count < least:
            raise WadiError(f"Received {count} {what}. Metric {name!r} needs at least {least}: add more, or leave it out.")

    @torch.no_grad()
    def look(
        self, source: Any, prompts: Sequence[str] | None = None, size: int | None = None, only: Sequence[str] | None = None
    ) -> Seen:
        """One pass over the pictures of ``source`` (as `wadi.evaluate.pictures.stream` takes them).

        Args:
            only: the networks to look with; None = all.
        Raises:
            WadiError: if pictures and prompts do not pair, or a picture cannot be read.
        """
        wanted = list(only) if only is not None else [*self.extractors, *self.scorers]
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        count = 0
        try:
            for part in batches(source, size, self.options.batch):
                images = [as_tensor(picture) for picture in part]
                lines = None if prompts is None else list(prompts[count : count + len(part)])
                count += len(part)
                if lines is not None and len(lines) < len(part):
                    raise WadiError(f"There are more pictures than the {len(prompts or ())} prompts. Expected one prompt each.")
                for name in wanted:
                    value = self.caches[name](images) if name in self.caches else self.scorers[name](images, lines)
                    found[name].append(value)
        finally:
            for cache in self.caches.values():
                cache.flush()
        if count == 0:
            raise WadiError("Received no pictures. Expected at least one.")
        if prompts is not None and count != len(prompts):
            raise WadiError(f"Received {count} pictures and {len(prompts)} prompts. Expected one prompt for each picture.")
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        return Seen(
            count,
            {name: rows for name, rows in joined.items() if name in EXTRACTORS},
            {name: rows for name, rows in joined.items() if name not in EXTRACTORS},
        )

    def numbers(
        self, seen: Seen, reference: Seen | None = None, labels: Sequence[str] | None = None,
        varied: tuple[Tensor, Sequence[str]] | None = None, prompts: Sequence[str] | None = None,
    ) -> dict[str, Number]:  # fmt: skip
        """The metrics, in the order of their names on the command line.

        Args:
            labels: of each picture, the concept it should show (``top1``).
            varied: features and prompts of pictures of which several share a prompt (``diversity``).
            prompts: of each picture, for the spread; None = prompts count as drawn anew with the images.
        """
        self.check(seen.count, reference=reference is not None)
        if reference is not None:
            self.check_reference(reference.count)
        several = prompts is not None and seen.count > 1 and self.options.spread
        nearest = nearest_prompts(prompts) if several and prompts is not None else None
        found: dict[str, Number] = {}
        for name in self.metrics:
            network = METRICS[name].network
            fake, real = seen.features.get(network), reference.features.get(network) if reference is not None else None
            if fake is None:
                found[name] = self._mean(seen.scores[network], nearest)
            elif name == "diversity":
                found[name] = self._variety(varied)
            elif name == "top1":
                found[name] = self._mean(self._named(fake, labels), nearest)
            elif real is not None:
                found |= self._compared(name, fake, real, nearest)
        return found

    def _compared(self, name: str, fake: Tensor, real: Tensor, nearest: Tensor | None) -> dict[str, Number]:
        """A metric of two sets of features."""
        if name in ("kid", "kd"):
            size = kid_size(len(fake), len(real))
            estimate = kernel_distance(fake, real, KID_SUBSETS, size, self.options.seed, nearest)
            return {self.title(name): self._number(estimate.value, estimate.spread)}
        if name == "pr":
            of = membership(real, fake, self.options.k)
            recall = recall_spread(real, fake, self.options.k, self.options.seed) if self.options.spread else None
            return {
                "precision": self._mean(of.precision, nearest),
                "recall": self._number(_mean(of.recall), recall),
                "density": self._mean(of.density, nearest),
                "coverage": self._number(_mean(of.coverage), self._of(of.coverage_influence, nearest)),
            }
        network = METRICS[name].network
        kept = self._gaussians.get(network)
        if kept is None or kept[0] is not real:  # factorised once for all rows
            kept = self._gaussians[network] = (real, frechet.gaussian(real))
        std = frechet.frechet_spread(fake, kept[1], nearest, self.options.seed) if self.options.spread else None
        return {self.title(name): self._number(frechet.frechet_distance(fake, kept[1]), std)}

    def settings(self, count: int, reference: int | None, size: int | None, prompts: bool = False) -> dict[str, Any]:
        """What the numbers rest on, for the protocol of a result.

        Args:
            prompts: whether the spread compares images of similar prompts.
        """
        told: dict[str, Any] = {"measure": MEASURE, "images": count, "size": size, "fitting": FITTING if size else None}
        told["spread"] = (
            {"method": SPREAD, "similar_prompts": prompts, "seed": self.options.seed} if self.options.spread else None
        )
        told["metrics"] = {}
        for name in self.metrics:
            network = METRICS[name].network
            judge = self.extractors.get(network) or self.scorers[network]
            about = dict(judge.protocol())
            if name in ("kid", "kd") and reference is not None:
                about |= {"subsets": KID_SUBSETS, "subset_size": kid_size(count, reference), "seed": self.options.seed}
            if name == "pr":
                about["k"] = self.options.k
            told["metrics"][name] = about
        return told

    def title(self, name: str) -> str:
        """A metric's name in results: a distance on other features than Inception's is named after them."""
        return f"{name} {self.extractors['features'].name}" if name in ("fd", "kd") else name

    def _extractor(self, name: str) -> Extractor:
        of = self.options
        return feature_network(of.features if name == "features" else name, of.resize, of.device, of.inception, of.download)

    def _variety(self, varied: tuple[Tensor, Sequence[str]] | None) -> Number:
        if varied is None:
            raise WadiError("Metric 'diversity' needs several pictures of a prompt. Expected --prompts, with some that repeat.")
        std = diversity_spread(*varied) if self.options.spread else None
        return self._number(same_prompt_diversity(*varied), std)

    def _named(self, features: Tensor, labels: Sequence[str] | None) -> Tensor:
        if labels is None or len(labels) != len(features):
            raise WadiError("Metric 'top1' needs the concept of each picture. Expected --protocol zoo.")
        best = self.classifier.head(features).argmax(1).tolist()
        return torch.tensor([self.classifier.concepts[i] == label for i, label in zip(best, labels, strict=True)])

    def _mean(self, values: Tensor, nearest: Tensor | None) -> Number:
        """Of a number for each picture."""
        return self._number(_mean(values), self._of(values.double(), nearest))

    def _of(self, influence: Tensor | None, nearest: Tensor | None) -> float | None:
        several = influence is not None and len(influence) > 1 and self.options.spread
        return spread_from_influence(influence, nearest) if several and influence is not None else None

    def _number(self, value: float, std: float | None) -> Number:
        if std is None or math.isnan(std) or not self.options.spread:
            return Number(value)
        return Number(value, std, value - Z * std, value + Z * std)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def kid_size(count: int, reference: int) -> int:
    """Pictures in a subset of a kernel distance: 1000 as published, at most half of the smaller set."""
    return min(KID_SIZE, min(count, reference) // 2)


def as_tensor(picture: Image.Image) -> Tensor:
    """RGB to uint8 ``(3, h, w)``."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
