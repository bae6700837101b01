"""Spread of a metric: how much it varies when the same prompts are generated again from other seeds.

The reference and the prompts stay fixed. Let ``phi_i`` be the influence of image ``i`` on a metric ``m``: the derivative of
``m`` by the weight of that image, times the number of images ``n``. (For a mean over images it is the image's own value.) Then

    Var(m) ~ sum_i Var(phi_i | prompt i) / n^2                    (infinitesimal jackknife; Efron, 1982)

A protocol has one image for each prompt, so the variance for a given prompt cannot be seen directly. Each image is compared
with the image of the most similar prompt instead, ``Var(phi_i) ~ (phi_i - phi_j)^2 / 2`` (collapsed strata; Wolter,
*Introduction to Variance Estimation*, 2007). The difference between these two prompts stays in the estimate, so on average it
is an upper bound.

The bootstrap, which draws the images again with replacement, is not used. It repeats images, and a Frechet distance or a
metric of nearest neighbours takes that for a narrower set. With few images its spread is several times too large.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from wadi.errors import WadiError

CANDIDATES = 64  # prompts that are compared with each prompt
Z = 1.959964  # standard deviations on each side of the mean that contain 95 % of a normal distribution


def spread_from_influence(influence: Tensor, nearest: Tensor | None = None) -> float:
    """Return the standard deviation of a metric from the influence ``(n,)`` of each image.

    Args:
        nearest: ``(n,)``, for each image the index of another one with a similar prompt (`nearest_prompts`). None = compare
            each image with the mean of all, as if its prompt were also drawn again.
    Raises:
        WadiError: if there are fewer than two images, or an influence is not finite.
    """
    count = len(influence)
    if count < 2:
        raise WadiError(f"There are {count} images, and a spread needs at least 2. Add images.")
    values = influence.detach().double()
    if not bool(values.isfinite().all()):
        raise WadiError("The influence of an image is NaN or infinite. Check its features and scores.")
    if nearest is None:
        return float(values.std()) / math.sqrt(count)
    return math.sqrt(float((values - values[nearest]).square().mean()) / 2 / count)


def nearest_prompts(prompts: Sequence[str]) -> Tensor:
    """Return for each of ``n`` prompts the index ``(n,)`` of the most similar other prompt.

    Prompts are similar if they share rare words: the cosine of their words, each weighted by ``log(n / prompts with this
    word)``. Only prompts that share one of the rarest words are compared, so the time is proportional to ``n``.

    Raises:
        WadiError: on fewer than two prompts.
    """
    if len(prompts) < 2:
        raise WadiError(f"There are {len(prompts)} prompts. Give at least 2.")
    words = [frozenset(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
    frequency = Counter(word for line in words for word in line)
    weight = {word: math.log(1 + len(prompts) / count) for word, count in frequency.items()}
    length = [math.sqrt(sum(weight[word] ** 2 for word in line)) or 1.0 for line in words]
    same: dict[frozenset[str], list[int]] = defaultdict(list)
    containing: dict[str, list[int]] = defaultdict(list)
    for index, line in enumerate(words):
        same[line].append(index)
        for word in line:
            containing[word].append(index)
    nearest = []
    for index, line in enumerate(words):
        twins = same[line]
        if len(twins) > 1:
            nearest.append(_following(twins, index)[0])
            continue
        scored = (
            (sum(weight[w] ** 2 for w in line & words[other]) / length[other], -other)
            for other in _prompts_that_share_words(index, line, containing)
        )
        best = max(scored, default=None)
        nearest.append(-best[1] if best is not None else (index + 1) % len(prompts))
    return torch.tensor(nearest)


def _prompts_that_share_words(index: int, line: frozenset[str], containing: dict[str, list[int]]) -> list[int]:
    """Return up to `CANDIDATES` other prompts that share a word with this one, those of its rarest words first."""
    candidates: dict[int, None] = {}
    for word in sorted(line, key=lambda word: (len(containing[word]), word)):
        candidates |= dict.fromkeys(_following(containing[word], index))
        if len(candidates) >= CANDIDATES:
            break
    return list(candidates)[:CANDIDATES]


def _following(indices: list[int], index: int) -> list[int]:
    """Return up to `CANDIDATES` entries that follow the entry ``index`` in an ascending list, as if it were a circle."""
    place = bisect_left(indices, index)
    circle = indices[place + 1 : place + 1 + CANDIDATES]
    return circle + indices[: min(place, CANDIDATES - len(circle))]
