"""How different are pictures of one prompt? The mean distance of their features over all pairs within a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.metrics.checks import Images, as_bytes, rows

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
