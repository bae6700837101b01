"""Spread of a metric: how much it varies when the same prompts are generated again from other seeds.

The reference and the prompts stay fixed. Let ``phi_i`` be the influence of image ``i`` on a metric ``m``: the derivative of
``m`` by the weight of that image, times the number of images ``n`` (of a mean over images it is the image's own value). Then

    Var(m) ~ sum_i Var(phi_i | prompt i) / n^2                    (infinitesimal jackknife; Efron, 1982)

A protocol has one image for each prompt, so the variance given the prompt cannot be seen directly. Each image is compared with
the image of the most similar prompt instead, ``Var(phi_i) ~ (phi_i - phi_j)^2 / 2`` (collapsed strata; Wolter, *Introduction to
Variance Estimation*, 2007). What these two prompts differ in stays in the estimate, so it is an upper bound on average.

Drawing the images again with replacement (the bootstrap) is not used: it repeats images, which a Frechet distance and the
measures of nearest neighbours take for a narrower set. Its spread is several times too large where images are few.
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
Z = 1.959964  # of the normal distribution: 95 % lie within so many standard deviations


def of_influence(influence: Tensor, nearest: Tensor | None = None) -> float:
    """Standard deviation of a metric from the influence ``(n,)`` of each image.

    Args:
        nearest: ``(n,)``, for each image the index of another one whose prompt is similar (`nearest_prompts`); None = compare
            each image with the mean of all, as if each came with a prompt of its own that is also drawn anew.
    Raises:
        WadiError: if there are fewer than two images, or an influence is not finite.
    """
    count = len(influence)
    if count < 2:
        raise WadiError(f"Received {count} images. A spread needs at least 2: add images.")
    values = influence.detach().double()
    if not bool(values.isfinite().all()):
        raise WadiError("The influence of an image is not finite. Expected finite features and scores.")
    if nearest is None:
        return float(values.std()) / math.sqrt(count)
    return math.sqrt(float((values - values[nearest]).square().mean()) / 2 / count)


def nearest_prompts(prompts: Sequence[str]) -> Tensor:
    """For each of ``n`` prompts the index ``(n,)`` of the most similar other one.

    Similar are prompts that share rare words: the cosine of their words, each weighted by ``log(n / prompts with this word)``.
    Only prompts that share one of the rarest words are compared, so the time grows with ``n`` alone.

    Raises:
        WadiError: on fewer than two prompts.
    """
    if len(prompts) < 2:
        raise WadiError(f"Received {len(prompts)} prompts. Expected at least 2.")
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
    found = []
    for index, line in enumerate(words):
        twins = same[line]
        if len(twins) > 1:
            found.append(_after(twins, index)[0])
            continue
        scored = (
            (sum(weight[w] ** 2 for w in line & words[other]) / length[other], -other)
            for other in _sharing(index, line, containing)
        )
        best = max(scored, default=None)
        found.append(-best[1] if best is not None else (index + 1) % len(prompts))
    return torch.tensor(found)


def _sharing(index: int, line: frozenset[str], containing: dict[str, list[int]]) -> list[int]:
    """Up to `CANDIDATES` other prompts that share a word with this one, those of its rarest words first."""
    found: dict[int, None] = {}
    for word in sorted(line, key=lambda word: (len(containing[word]), word)):
        found |= dict.fromkeys(_after(containing[word], index))
        if len(found) >= CANDIDATES:
            break
    return list(found)[:CANDIDATES]


def _after(indices: list[int], index: int) -> list[int]:
    """Up to `CANDIDATES` entries of an ascending list that follow its entry ``index``, in a circle and without it."""
    place = bisect_left(indices, index)
    circle = indices[place + 1 : place + 1 + CANDIDATES]
    return circle + indices[: min(place, CANDIDATES - len(circle))]
