"""How different are pictures of one prompt? The mean distance of their features over all pairs within a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import Images, as_bytes, rows
from wadi.metrics.spread import of_influence

NAME = "diversity"


def diversity(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Mean over groups of `per_group`: 0 when all pictures of a prompt are one.

    Args:
        features: ``(n, d)``.
        groups: the prompt (or its number) of each image.
    Raises:
        WadiError: if a group has a single image, the two do not pair, or features are not finite.
    """
    return float(per_group(features, groups).mean())


def per_group(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Mean Euclidean distance ``(number of groups,)`` over the pairs of each group, in order of first appearance."""
    found = rows(features, 2, NAME)
    return torch.stack([torch.nn.functional.pdist(found[members]).mean() for members in _members(groups, len(found))])


def spread(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Standard deviation of `diversity` when the images of the same prompts are generated again.

    Within a group the mean over pairs ``U`` has the variance ``E[U^2] - theta^2``. The mean of ``d_ij d_kl`` over all
    ``i, j, k, l`` that differ is an unbiased estimate of ``theta^2``. It needs four images: where a group has fewer, the
    variance over groups is taken instead, in which the prompts differ too.

    Raises:
        WadiError: as `diversity`.
    """
    found = rows(features, 2, NAME)
    members = list(_members(groups, len(found)))
    if min(map(len, members)) < 4:
        return of_influence(per_group(features, groups)) if len(members) > 1 else math.nan
    variances = [_variance_of_mean_distance(torch.cdist(found[of], found[of])) for of in members]
    return math.sqrt(max(sum(variances), 0.0)) / len(members)


def _variance_of_mean_distance(distance: Tensor) -> float:
    """Unbiased, from the table of distances ``(m, m)`` of at least four images."""
    m, total, square = len(distance), distance.sum(), distance.square().sum()
    sharing = distance.sum(1).square().sum() - square  # sum of d_ij d_ik over j != k
    apart = (total**2 - 4 * sharing - 2 * square) / (m * (m - 1) * (m - 2) * (m - 3))
    return float((total / (m * (m - 1))) ** 2 - apart)


def pairwise(images: Images, groups: Sequence[Hashable], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """As `per_group` with another distance of two batches of images, such as LPIPS.

    Args:
        images: as an extractor takes them.
        distance: two uint8 batches ``(n, 3, h, w)`` to ``(n,)``.
    """
    pictures = as_bytes(images)
    means = []
    for members in _members(groups, len(pictures)):
        one, two = torch.combinations(torch.tensor(members)).T.tolist()
        means.append(distance(torch.stack([pictures[i] for i in one]), torch.stack([pictures[i] for i in two])).double().mean())
    return torch.stack(means)


def _members(groups: Sequence[Hashable], count: int) -> list[list[int]]:
    if len(groups) != count:
        raise WadiError(f"Received {count} images and {len(groups)} prompts. Expected one prompt for each image.")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    alone = [group for group, of in members.items() if len(of) < 2]
    if alone:
        raise WadiError(
            f"{len(alone)} of {len(members)} prompts have a single image, {alone[0]!r} for one. The {NAME} needs at least 2 "
            "images of each prompt."
        )
    return list(members.values())
