"""Compute metrics: one pass over the images for all networks, then the metrics with their spread.

The spread is the standard deviation of a metric if the images were generated again from other seeds, with the same prompts and
reference (`wadi.metrics.spread`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.evaluate.image_sets import FITTING, as_tensor, batches
from wadi.evaluate.metric_networks import feature_network, scorer
from wadi.evaluate.metric_table import EXTRACTORS, KID_SUBSETS, MEASURE, METRICS, SPREAD, Options, kid_size
from wadi.evaluate.result import Number
from wadi.io.user_cache import cache_folder
from wadi.metrics import frechet
from wadi.metrics.cache import FeatureCache
from wadi.metrics.diversity import diversity_spread, same_prompt_diversity
from wadi.metrics.features import Extractor
from wadi.metrics.kernel import kernel_distance
from wadi.metrics.neighbours import membership, recall_spread
from wadi.metrics.spread import Z, nearest_prompts, spread_from_influence


@dataclass(frozen=True)
class NetworkOutputs:
    """The outputs of the networks on a set of images: features ``(n, d)`` and scores ``(n,)``, by network."""

    count: int
    features: dict[str, Tensor]
    scores: dict[str, Tensor]


class Judge:
    """The networks that some metrics need, loaded once.

    Args:
        load: False = load nothing; then only `check` works. For processes that only generate images.
    Raises:
        WadiError: on an unknown metric, or weights that are not on this machine.
    """

    def __init__(self, metrics: Sequence[str], options: Options | None = None, load: bool = True) -> None:
        self.metrics, self.options = list(dict.fromkeys(metrics)), options or Options()
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise WadiError(f"Metric {unknown[0]!r} does not exist. Use some of {', '.join(METRICS)}.")
        if not self.metrics:
            raise WadiError(f"No metric is given. Use some of {', '.join(METRICS)}.")
        if self.options.batch < 1 or self.options.k < 1:
            raise WadiError(f"batch is {self.options.batch} and k is {self.options.k}. Both must be at least 1.")
        needed = dict.fromkeys(METRICS[name].network for name in self.metrics if load)
        self.extractors = {name: self._extractor(name) for name in needed if name in EXTRACTORS}
        cache = (self.options.cache or cache_folder() / "features") / f"measure-{MEASURE}"
        self.caches = {name: FeatureCache(network, cache) for name, network in self.extractors.items()}
        self.scorers = {
            name: scorer(name, self.options.weights, self.options.device) for name in needed if name not in EXTRACTORS
        }
        self._gaussians: dict[str, tuple[Tensor, frechet.Gaussian]] = {}  # of references, by network
        self.classifier: Any = None
        if "top1" in self.metrics and load:
            from wadi.zoo import load_classifier

            self.classifier = load_classifier()

    @property
    def reference_networks(self) -> list[str]:
        """The networks that compare images with a reference."""
        return list(dict.fromkeys(METRICS[name].network for name in self.metrics if METRICS[name].reference))

    @property
    def needs_prompts(self) -> bool:
        """Whether any metric depends on which prompt belongs to which image."""
        return any(METRICS[name].prompts or name == "diversity" for name in self.metrics)

    def check(self, count: int, prompts: bool = True, reference: bool = True) -> None:
        """Raise `WadiError` if a metric needs more images, prompts, or a reference. Call it before any network runs."""
        for name in self.metrics:
            self._check_count(name, count, "images")
            if METRICS[name].prompts and not prompts:
                raise WadiError(f"Metric {name!r} needs the prompt of each image. Add --prompts with a line for each.")
            if METRICS[name].reference and not reference:
                raise WadiError(f"Metric {name!r} needs a reference. Add --reference with a folder of images.")

    def check_reference(self, count: int) -> None:
        """Raise `WadiError` if a metric needs more reference images."""
        for name in self.metrics:
            if METRICS[name].reference:
                self._check_count(name, count, "reference images")

    def _check_count(self, name: str, count: int, what: str) -> None:
        least = self.options.k + 1 if name == "pr" else METRICS[name].least
        if count < least:
            raise WadiError(f"There are {count} {what}, and metric {name!r} needs at least {least}. Add more, or leave it out.")

    @torch.no_grad()
    def run_networks(
        self, source: Any, prompts: Sequence[str] | None = None, size: int | None = None, only: Sequence[str] | None = None
    ) -> NetworkOutputs:
        """Run the networks on the images of ``source`` (as `wadi.evaluate.image_sets.stream` takes them), in one pass.

        Args:
            size: side that images are cropped and resized to; None = as they are.
            only: the networks to run; None = all.
        Raises:
            WadiError: if there is not one prompt for each image, or an image cannot be read.
        """
        networks = list(only) if only is not None else [*self.extractors, *self.scorers]
        outputs: dict[str, list[Tensor]] = {name: [] for name in networks}
        count = 0
        try:
            for part in batches(source, size, self.options.batch):
                images = [as_tensor(image) for image in part]
                lines = None if prompts is None else list(prompts[count : count + len(part)])
                count += len(part)
                if lines is not None and len(lines) < len(part):
                    raise WadiError(
                        f"There are more images than the {len(prompts or ())} prompts. Give one prompt for each image."
                    )
                for name in networks:
                    value = self.caches[name](images) if name in self.caches else self.scorers[name](images, lines)
                    outputs[name].append(value)
        finally:
            for cache in self.caches.values():
                cache.flush()
        if count == 0:
            raise WadiError("The set of images is empty. Give at least one image.")
        if prompts is not None and count != len(prompts):
            raise WadiError(f"There are {count} images and {len(prompts)} prompts. Give one prompt for each image.")
        joined = {name: torch.cat(parts) for name, parts in outputs.items()}
        return NetworkOutputs(
            count,
            {name: rows for name, rows in joined.items() if name in EXTRACTORS},
            {name: rows for name, rows in joined.items() if name not in EXTRACTORS},
        )

    def compute(
        self, outputs: NetworkOutputs, reference: NetworkOutputs | None = None, labels: Sequence[str] | None = None,
        varied: tuple[Tensor, Sequence[str]] | None = None, prompts: Sequence[str] | None = None,
    ) -> dict[str, Number]:  # fmt: skip
        """Return the metrics, in the order of their names on the command line.

        Args:
            labels: the concept that each image should show (``top1``).
            varied: features and prompts of images of which several share a prompt (``diversity``).
            prompts: of each image, for the spread; None = the spread includes the variation of prompts.
        """
        self.check(outputs.count, reference=reference is not None)
        if reference is not None:
            self.check_reference(reference.count)
        with_spread = prompts is not None and outputs.count > 1 and self.options.spread
        nearest = nearest_prompts(prompts) if with_spread and prompts is not None else None
        results: dict[str, Number] = {}
        for name in self.metrics:
            network = METRICS[name].network
            generated_features, reference_features = (
                outputs.features.get(network),
                reference.features.get(network) if reference is not None else None,
            )
            if generated_features is None:
                results[name] = self._mean_number(outputs.scores[network], nearest)
            elif name == "diversity":
                results[name] = self._diversity(varied)
            elif name == "top1":
                results[name] = self._mean_number(self._names_its_concept(generated_features, labels), nearest)
            elif reference_features is not None:
                results |= self._compare_features(name, generated_features, reference_features, nearest)
        return results

    def _compare_features(self, name: str, fake: Tensor, real: Tensor, nearest: Tensor | None) -> dict[str, Number]:
        """Return a metric of two sets of features."""
        if name in ("kid", "kd"):
            size = kid_size(len(fake), len(real))
            estimate = kernel_distance(fake, real, KID_SUBSETS, size, self.options.seed, nearest)
            return {self.result_name(name): self._number(estimate.value, estimate.spread)}
        if name == "pr":
            members = membership(real, fake, self.options.k)
            recall = recall_spread(real, fake, self.options.k, self.options.seed) if self.options.spread else None
            return {
                "precision": self._mean_number(members.precision, nearest),
                "recall": self._number(_mean(members.recall), recall),
                "density": self._mean_number(members.density, nearest),
                "coverage": self._number(_mean(members.coverage), self._spread(members.coverage_influence, nearest)),
            }
        network = METRICS[name].network
        cached = self._gaussians.get(network)
        if cached is None or cached[0] is not real:  # factorised once for all rows
            cached = self._gaussians[network] = (real, frechet.gaussian(real))
        std = frechet.frechet_spread(fake, cached[1], nearest, self.options.seed) if self.options.spread else None
        return {self.result_name(name): self._number(frechet.frechet_distance(fake, cached[1]), std)}

    def settings(self, count: int, reference: int | None, size: int | None, prompts: bool = False) -> dict[str, Any]:
        """Return everything that the metrics depend on, for the protocol of a result.

        Args:
            prompts: whether the spread compares images of similar prompts.
        """
        settings: dict[str, Any] = {"measure": MEASURE, "images": count, "size": size, "fitting": FITTING if size else None}
        settings["spread"] = (
            {"method": SPREAD, "similar_prompts": prompts, "seed": self.options.seed} if self.options.spread else None
        )
        settings["metrics"] = {}
        for name in self.metrics:
            network = METRICS[name].network
            metric_network = self.extractors.get(network) or self.scorers[network]
            metric_settings = dict(metric_network.protocol())
            if name in ("kid", "kd") and reference is not None:
                metric_settings |= {
                    "subsets": KID_SUBSETS,
                    "subset_size": kid_size(count, reference),
                    "seed": self.options.seed,
                }
            if name == "pr":
                metric_settings["k"] = self.options.k
            settings["metrics"][name] = metric_settings
        return settings

    def result_name(self, name: str) -> str:
        """Return a metric's name in results. A distance on features other than Inception's has its network's name."""
        return f"{name} {self.extractors['features'].name}" if name in ("fd", "kd") else name

    def _extractor(self, name: str) -> Extractor:
        opts = self.options
        return feature_network(
            opts.features if name == "features" else name, opts.resize, self.options.device, opts.inception, opts.download
        )

    def _diversity(self, varied: tuple[Tensor, Sequence[str]] | None) -> Number:
        if varied is None:
            raise WadiError("Metric 'diversity' needs several images of a prompt. Add --prompts, with prompts that repeat.")
        std = diversity_spread(*varied) if self.options.spread else None
        return self._number(same_prompt_diversity(*varied), std)

    def _names_its_concept(self, features: Tensor, labels: Sequence[str] | None) -> Tensor:
        """Return whether the classifier names the right concept for each image."""
        if labels is None or len(labels) != len(features):
            raise WadiError("Metric 'top1' needs the concept of each image. Add --protocol zoo.")
        best = self.classifier.head(features).argmax(1).tolist()
        return torch.tensor([self.classifier.concepts[i] == label for i, label in zip(best, labels, strict=True)])

    def _mean_number(self, values: Tensor, nearest: Tensor | None) -> Number:
        """Return the mean of a value for each image, with its spread."""
        return self._number(_mean(values), self._spread(values.double(), nearest))

    def _spread(self, influence: Tensor | None, nearest: Tensor | None) -> float | None:
        """Return the standard deviation from the influence of each image, or None."""
        has_spread = influence is not None and len(influence) > 1 and self.options.spread
        return spread_from_influence(influence, nearest) if has_spread and influence is not None else None

    def _number(self, value: float, std: float | None) -> Number:
        if std is None or math.isnan(std) or not self.options.spread:
            return Number(value)
        return Number(value, std, value - Z * std, value + Z * std)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
