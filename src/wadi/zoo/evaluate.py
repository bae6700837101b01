"""How good are one-step pictures of the embedded teacher's prompts? Four numbers per generator, with their spread over seeds.

Frechet distance to the teacher's pictures of the same prompts from other noise, in the features of a small classifier trained
on the data (so it is no FID); top-1, how often that classifier names the prompted concept; same-prompt diversity, the mean
pairwise distance of those features among pictures of one prompt; milliseconds per picture, one at a time, decoding included.
The many-step teacher held against itself is the floor that sampling alone leaves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wadi.metrics.frechet import frechet_distance, moments
from wadi.zoo.concepts import CONCEPTS
from wadi.zoo.prompts import eval_prompts

if TYPE_CHECKING:
    from wadi.zoo.classifier import Classifier

# Prompts and seeds to pictures (B, 3, 64, 64) in [0, 1].
Drawer = Callable[[Sequence[str], Sequence[int]], Tensor]

SEED_STEP = 10_000  # between sets of seeds; set 0 is the reference
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 12, 8
TIMED = 20  # pictures per generator


@dataclass(frozen=True)
class Score:
    """One generator; each number is a mean over sets of seeds and ``_spread`` its standard deviation."""

    name: str
    frechet: float
    frechet_spread: float
    top1: float
    top1_spread: float
    diversity: float
    diversity_spread: float
    ms: float
    ms_spread: float


@torch.no_grad()
def features(classifier: Classifier, pictures: Tensor) -> Tensor:
    """Penultimate activations, ``(N, 96)``."""
    return torch.cat([classifier.features(part) for part in pictures.split(128)])


def diversity(rows: Tensor, seeds: int) -> float:
    """Mean pairwise distance within groups of ``seeds`` consecutive rows of features ``(prompts * seeds, D)``."""
    groups = rows.double().unflatten(0, (-1, seeds))
    return float(torch.cdist(groups, groups).sum((1, 2)).mean() / (seeds * (seeds - 1)))


def evaluate(
    drawers: Mapping[str, Drawer],
    reference: Drawer,
    classifier: Classifier,
    sets: int = 3,
    count: int | None = None,
    reference_sets: int = 1,
) -> list[Score]:
    """Score each generator; ``reference`` is the many-step teacher.

    Args:
        sets: sets of seeds, each a repetition of the whole measurement.
        count: pictures per set; None = all fixed prompts.
        reference_sets: sets for ``reference`` itself, which takes many times as long.
    """
    rows = eval_prompts()[:count]
    prompts, concepts, seeds = (list(column) for column in zip(*rows, strict=True))
    truth = moments(features(classifier, reference(prompts, seeds)))
    varied = [concept for concept in list(CONCEPTS)[:: len(CONCEPTS) // DIVERSITY_PROMPTS] for _ in range(DIVERSITY_SEEDS)]
    scores = []
    for name, draw in drawers.items():
        measured = []
        repeats = reference_sets if draw is reference else sets
        for offset in range(SEED_STEP, SEED_STEP * (repeats + 1), SEED_STEP):
            pictures = draw(prompts, [offset + seed for seed in seeds])
            of_one_prompt = draw(varied, [offset + i for i in range(len(varied))])
            measured.append(
                (
                    frechet_distance(moments(features(classifier, pictures)), truth),
                    classifier.top1(pictures, concepts),
                    diversity(features(classifier, of_one_prompt), DIVERSITY_SEEDS),
                )
            )
        frechet, top1, variety = (mean_and_spread(column) for column in zip(*measured, strict=True))
        scores.append(Score(name, *frechet, *top1, *variety, *latency(draw, prompts)))
    return scores


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def latency(draw: Drawer, prompts: Sequence[str]) -> tuple[float, float]:
    """Median milliseconds of one picture at a time, and half the distance of the quartiles."""
    draw(prompts[:1], [0])
    times = []
    for i, prompt in enumerate(prompts[:TIMED]):
        start = time.perf_counter()
        draw([prompt], [i])
        times.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| | Frechet distance (classifier features) | concept named (top-1) | same-prompt diversity | ms per picture |",
        "|---|---|---|---|---|",
    ]
    for s in scores:
        lines.append(
            f"| {s.name} | {s.frechet:.2f} ± {s.frechet_spread:.2f} | {s.top1:.3f} ± {s.top1_spread:.3f} "
            f"| {s.diversity:.2f} ± {s.diversity_spread:.2f} | {s.ms:.0f} ± {s.ms_spread:.0f} |"
        )
    return "\n".join(lines)
