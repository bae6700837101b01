"""Diversity: how different the images of one prompt are. The mean distance of their features over all pairs of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import Images, as_bytes, rows
from wadi.metrics.spread import spread_from_influence

NAME = "diversity"


def same_prompt_diversity(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Return the mean over prompts of `diversity_of_each_prompt`: 0 if all images of each prompt are the same.

    Args:
        features: ``(n, d)``.
        groups: the prompt (or its number) of each image.
    Raises:
        WadiError: if a prompt has only one image, the two arguments differ in length, or features are not finite.
    """
    return float(diversity_of_each_prompt(features, groups).mean())


def diversity_of_each_prompt(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Return the mean Euclidean distance over the pairs of each prompt, ``(prompts,)``, in order of first appearance."""
    values = rows(features, 2, NAME)
    return torch.stack([torch.nn.functional.pdist(values[members]).mean() for members in _group_members(groups, len(values))])


def diversity_spread(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Return the standard deviation of `same_prompt_diversity` when the images of the same prompts are generated again.

    Within a prompt the mean over pairs ``U`` has the variance ``E[U^2] - theta^2``. The mean of ``d_ij d_kl`` over all
    different ``i, j, k, l`` is an unbiased estimate of ``theta^2``. It needs four images. Where a prompt has fewer, the
    variance over prompts is used instead, which also contains the differences between prompts.

    Raises:
        WadiError: as `same_prompt_diversity`.
    """
    values = rows(features, 2, NAME)
    members = _group_members(groups, len(values))
    if min(map(len, members)) < 4:
        return spread_from_influence(diversity_of_each_prompt(features, groups)) if len(members) > 1 else math.nan
    variances = [_variance_of_mean_distance(torch.cdist(values[group], values[group])) for group in members]
    return math.sqrt(max(sum(variances), 0.0)) / len(members)


def _variance_of_mean_distance(distance: Tensor) -> float:
    """Return the unbiased estimate from the distances ``(m, m)`` of at least four images."""
    m, total, square = len(distance), distance.sum(), distance.square().sum()
    sharing = distance.sum(1).square().sum() - square  # sum of d_ij d_ik over j != k
    apart = (total**2 - 4 * sharing - 2 * square) / (m * (m - 1) * (m - 2) * (m - 3))
    return float((total / (m * (m - 1))) ** 2 - apart)


def image_distances(images: Images, groups: Sequence[Hashable], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the same as `diversity_of_each_prompt`, with another distance between images, such as LPIPS.

    Args:
        images: as an `Extractor` takes them.
        distance: from two uint8 batches ``(n, 3, h, w)`` to ``(n,)``.
    """
    images = as_bytes(images)
    means = []
    for members in _group_members(groups, len(images)):
        one, two = torch.combinations(torch.tensor(members)).T.tolist()
        means.append(distance(torch.stack([images[i] for i in one]), torch.stack([images[i] for i in two])).double().mean())
    return torch.stack(means)


def _group_members(groups: Sequence[Hashable], count: int) -> list[list[int]]:
    """Return the indices of the images of each prompt."""
    if len(groups) != count:
        raise WadiError(f"There are {count} images and {len(groups)} prompts. Give one prompt for each image.")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    alone = [group for group, indices in members.items() if len(indices) < 2]
    if alone:
        raise WadiError(
            f"{len(alone)} of {len(members)} prompts have only one image (first: {alone[0]!r}). The {NAME} needs at least 2 "
            "images of each prompt."
        )
    return list(members.values())
