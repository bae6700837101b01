"""Does the picture follow the condition, and what does it cost? Measures and a table, over several sets of pictures.

F1 within 1 px: precision is the share of the output's edge pixels with an edge of the condition among their eight neighbours or
at their place; recall the same the other way round. Sharpness: the mean of the tenth of gradient lengths that are longest, as a
share of the same in the picture that the edges came from. Time: median of single pictures, decoding included.
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

from wadi.extras.control.conditions import edge_map, gradient, thickened, to_picture
from wadi.extras.control.pipeline import control_arguments
from wadi.io import markdown

# Prompts, condition images and seeds to pictures (B, 3, H, W) in [0, 1].
Way = Callable[[Sequence[str], Sequence[Image.Image], Sequence[int]], Tensor]
Judge = Callable[[Tensor, Sequence[str]], float]


def edge_f1(edges: Tensor, wanted: Tensor, radius: int = 1) -> float:
    """Mean over pictures of F1 between edge maps ``(B, 1, H, W)``, edges within ``radius`` pixels counted as met."""
    hits = (edges & thickened(wanted, radius)).flatten(1).sum(1)
    met = (wanted & thickened(edges, radius)).flatten(1).sum(1)
    precision = hits / edges.flatten(1).sum(1).clamp(min=1)
    recall = met / wanted.flatten(1).sum(1).clamp(min=1)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-9)).mean())


def steepness(images: Tensor) -> Tensor:
    """Mean of the longest tenth of each picture's gradients, unblurred; ``(B,)``."""
    lengths = torch.hypot(*gradient(images, sigma=0)).flatten(1)
    return lengths.topk(max(1, lengths.shape[1] // 10), dim=1).values.mean(1)


def sharpness(images: Tensor, reference: Tensor) -> float:
    """`steepness` of ``images`` as a share of that of ``reference``, which is not paired with them."""
    return float(steepness(images).mean() / steepness(reference).mean())


@dataclass(frozen=True)
class Trial:
    """A set of conditions: ``prompts`` and ``seeds`` to draw with, and the ``pictures (N, 3, H, W)`` the edges come from."""

    prompts: list[str]
    seeds: list[int]
    pictures: Tensor

    @property
    def edges(self) -> Tensor:
        """``(N, 1, H, W)`` booleans."""
        return edge_map(self.pictures)

    @property
    def conditions(self) -> list[Image.Image]:
        """The edges as condition images."""
        return [to_picture(mask) for mask in self.edges]


@dataclass(frozen=True)
class Score:
    """One way of drawing; means over trials, ``_spread`` their standard deviation (of ms: half the quartiles' distance)."""

    name: str
    f1: float
    f1_spread: float
    sharpness: float
    sharpness_spread: float
    named: float | None
    named_spread: float | None
    ms: float
    ms_spread: float


def way(pipeline: Any, steps: int, call: Mapping[str, Any], strength: float | None = None, batch: int = 16) -> Way:
    """A pipeline as a function to pictures; ``strength`` None draws without looking at the condition.

    Args:
        call: further arguments of the pipeline's call (guidance, size).
    """

    def draw(prompts: Sequence[str], conditions: Sequence[Image.Image], seeds: Sequence[int]) -> Tensor:
        parts: list[Image.Image] = []
        for i in range(0, len(prompts), batch):
            now = slice(i, i + batch)
            shown = {} if strength is None else control_arguments(pipeline, list(conditions[now]), strength)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[now]]
            parts += pipeline(
                prompt=list(prompts[now]), generator=generators, num_inference_steps=steps, **{**call, **shown}
            ).images
        return stacked(parts)

    return draw


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as ``(B, 3, H, W)`` in ``[0, 1]``."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def evaluate(ways: Mapping[str, Way], trials: Sequence[Trial], judge: Judge | None = None, timed: int = 12) -> list[Score]:
    """Score each way on the same conditions, prompts and noise.

    Args:
        judge: share of pictures that show what their prompt names.
        timed: single pictures that the time is the median of.
    """
    scores = []
    for name, draw in ways.items():
        f1, sharp, named = [], [], []
        for trial in trials:
            pictures = draw(trial.prompts, trial.conditions, trial.seeds)
            f1.append(edge_f1(edge_map(pictures), trial.edges))
            sharp.append(sharpness(pictures, trial.pictures))
            named += [judge(pictures, trial.prompts)] if judge else []
        share, share_spread = mean_and_spread(named) if named else (None, None)
        ms, ms_spread = latency(draw, trials[0], timed)
        scores.append(Score(name, *mean_and_spread(f1), *mean_and_spread(sharp), share, share_spread, ms, ms_spread))
    return scores


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def latency(draw: Way, trial: Trial, count: int) -> tuple[float, float]:
    """Median milliseconds of one picture at a time, and half the distance of the quartiles."""
    conditions = trial.conditions
    draw(trial.prompts[:1], conditions[:1], trial.seeds[:1])  # the first call pays for set-up
    times = []
    for i in range(max(2, count)):
        row = slice(i % len(conditions), i % len(conditions) + 1)
        start = time.perf_counter()
        draw(trial.prompts[row], conditions[row], trial.seeds[row])
        times.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def table(scores: Sequence[Score], slow: str) -> str:
    """The scores as a Markdown table; speed-up against the one called ``slow``."""
    judged = any(score.named is not None for score in scores)
    base = next(score.ms for score in scores if score.name == slow)
    heads = ["", "edge F1 within 1 px", "sharpness", *(["concept named"] if judged else []), "ms per picture", "speed-up"]
    lines = []
    for s in scores:
        cells = [markdown.escape(s.name), f"{s.f1:.3f} ± {s.f1_spread:.3f}", f"{s.sharpness:.2f} ± {s.sharpness_spread:.2f}"]
        if s.named is not None and s.named_spread is not None:
            cells.append(f"{s.named:.3f} ± {s.named_spread:.3f}")
        lines.append([*cells, f"{s.ms:.0f} ± {s.ms_spread:.0f}", f"{base / s.ms:.1f}"])
    return markdown.table(heads, lines)


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scores as plain dictionaries."""
    return [dataclasses.asdict(score) for score in scores]
