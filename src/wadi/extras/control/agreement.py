"""Measure how well images follow their conditions, and at what cost, over several sets of images; and write a table of it.

F1 within 1 px: precision is the share of an image's edge pixels that have an edge of the condition at their place or among
their eight neighbours; recall is the same with the roles exchanged. Sharpness: the mean of the longest tenth of the gradients,
divided by the same mean in the images that the edges come from. Time: the median over single images, decoding included.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wadi.extras.control.arguments import control_arguments
from wadi.extras.control.condition_images import to_image
from wadi.extras.control.edges import edge_map, gradient, thicken
from wadi.io import markdown

# From prompts, condition images and seeds to images (B, 3, H, W) in [0, 1].
Method = Callable[[Sequence[str], Sequence[Image.Image], Sequence[int]], Tensor]
Judge = Callable[[Tensor, Sequence[str]], float]


def edge_f1(edges: Tensor, target: Tensor, radius: int = 1) -> float:
    """Return the mean F1 over images between edge maps ``(B, 1, H, W)``; edges within ``radius`` pixels match."""
    hits = (edges & thicken(target, radius)).flatten(1).sum(1)
    met = (target & thicken(edges, radius)).flatten(1).sum(1)
    precision = hits / edges.flatten(1).sum(1).clamp(min=1)
    recall = met / target.flatten(1).sum(1).clamp(min=1)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-9)).mean())


def steepness(images: Tensor) -> Tensor:
    """Return the mean of the longest tenth of each image's gradients, without blur; ``(B,)``."""
    lengths = torch.hypot(*gradient(images, sigma=0)).flatten(1)
    return lengths.topk(max(1, lengths.shape[1] // 10), dim=1).values.mean(1)


def sharpness(images: Tensor, reference: Tensor) -> float:
    """Return the mean `steepness` of ``images`` divided by that of ``reference``; the two sets are not paired."""
    return float(steepness(images).mean() / steepness(reference).mean())


@dataclass(frozen=True)
class Trial:
    """A set of conditions: ``prompts`` and ``seeds`` to generate with, and the ``images (N, 3, H, W)`` the edges come from."""

    prompts: list[str]
    seeds: list[int]
    images: Tensor

    @property
    def edges(self) -> Tensor:
        """``(N, 1, H, W)`` booleans."""
        return edge_map(self.images)

    @property
    def conditions(self) -> list[Image.Image]:
        """The edges as condition images."""
        return [to_image(mask) for mask in self.edges]


@dataclass(frozen=True)
class Score:
    """Metrics of one method.

    Attributes:
        name: of the method.
        f1, sharpness, named: means over trials; ``named`` is the share of images that show what their prompt names.
        ms: median milliseconds per image.
        f1_spread, sharpness_spread, named_spread: standard deviations over trials.
        ms_spread: half the distance between the quartiles.
    """

    name: str
    f1: float
    f1_spread: float
    sharpness: float
    sharpness_spread: float
    named: float | None
    named_spread: float | None
    ms: float
    ms_spread: float


def method_of(pipeline: Any, steps: int, call: Mapping[str, Any], strength: float | None = None, batch: int = 16) -> Method:
    """Return a function that generates images with a pipeline.

    Args:
        call: further arguments of the pipeline's call (guidance, size).
        strength: of the control; None = ignore the conditions.
    """

    def generate(prompts: Sequence[str], conditions: Sequence[Image.Image], seeds: Sequence[int]) -> Tensor:
        images: list[Image.Image] = []
        for i in range(0, len(prompts), batch):
            part = slice(i, i + batch)
            control = {} if strength is None else control_arguments(pipeline, list(conditions[part]), strength)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            images += pipeline(
                prompt=list(prompts[part]), generator=generators, num_inference_steps=steps, **{**call, **control}
            ).images
        return stacked(images)

    return generate


def stacked(images: Sequence[Image.Image]) -> Tensor:
    """Return images as ``(B, 3, H, W)`` in ``[0, 1]``."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def score_methods(
    methods: Mapping[str, Method], trials: Sequence[Trial], judge: Judge | None = None, timed: int = 12
) -> list[Score]:
    """Score each method on the same conditions, prompts and noise.

    Args:
        judge: returns the share of images that show what their prompt names; None = leave that metric out.
        timed: number of single images of which the time is the median.
    """
    scores = []
    for name, generate in methods.items():
        f1, sharp, named = [], [], []
        for trial in trials:
            images = generate(trial.prompts, trial.conditions, trial.seeds)
            f1.append(edge_f1(edge_map(images), trial.edges))
            sharp.append(sharpness(images, trial.images))
            named += [judge(images, trial.prompts)] if judge else []
        share, share_spread = mean_and_spread(named) if named else (None, None)
        ms, ms_spread = latency(generate, trials[0], timed)
        scores.append(Score(name, *mean_and_spread(f1), *mean_and_spread(sharp), share, share_spread, ms, ms_spread))
    return scores


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def latency(generate: Method, trial: Trial, count: int) -> tuple[float, float]:
    """Return the median milliseconds for one image at a time, and half the distance between the quartiles."""
    conditions = trial.conditions
    generate(trial.prompts[:1], conditions[:1], trial.seeds[:1])  # the first call includes set-up
    times = []
    for i in range(max(2, count)):
        row = slice(i % len(conditions), i % len(conditions) + 1)
        start = time.perf_counter()
        generate(trial.prompts[row], conditions[row], trial.seeds[row])
        times.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def score_table(scores: Sequence[Score], slow: str) -> str:
    """Return the scores as a Markdown table. The speed-up is relative to the method called ``slow``."""
    judged = any(score.named is not None for score in scores)
    base = next(score.ms for score in scores if score.name == slow)
    heads = ["", "edge F1 within 1 px", "sharpness", *(["concept named"] if judged else []), "ms per image", "speed-up"]
    lines = []
    for s in scores:
        cells = [markdown.escape(s.name), f"{s.f1:.3f} ± {s.f1_spread:.3f}", f"{s.sharpness:.2f} ± {s.sharpness_spread:.2f}"]
        if s.named is not None and s.named_spread is not None:
            cells.append(f"{s.named:.3f} ± {s.named_spread:.3f}")
        lines.append([*cells, f"{s.ms:.0f} ± {s.ms_spread:.0f}", f"{base / s.ms:.1f}"])
    return markdown.table(heads, lines)


def scores_as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the scores as plain dictionaries."""
    return [dataclasses.asdict(score) for score in scores]
