"""The inputs of a network that come from the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

# Sizes of one row of a tensor, and its dtype if that is not a floating-point one: ``(512, 4096)``, ``((512,), torch.bool)``.
Shape = tuple[int, ...] | tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Condition:
    """All inputs of the network other than ``x_t`` and ``t``: tensors by name, each with the batch as its first dimension."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Condition:
        """Return rows by slice, index tensor or list. The batch dimension is always kept."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    def expand(self, batch: int) -> Condition:
        """Repeat a single row (such as the null prompt) ``batch`` times, without a copy."""
        return Condition({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move every tensor, as ``Tensor.to`` does."""
        return Condition({k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join several batches into one."""
        names = conditions[0].tensors
        return Condition({k: torch.cat([c.tensors[k] for c in conditions]) for k in names})


def padded(embeds: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """Return embeddings ``(B, tokens, width)`` and their mask ``(B, tokens)``, longer by zeros.

    Some pipelines pad only to the longest prompt of a batch. A condition has as many tokens whatever its batch.

    Args:
        embeds: ``(B, at most tokens, width)``.
        mask: ``(B, at most tokens)``; None = no padding.
    """
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    missing = tokens - embeds.shape[1]
    return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing))


def replace_empty_rows(prompts: Sequence[str], null: Tensor, encoded: Tensor) -> Tensor:
    """Return ``encoded`` ``(B, ...)`` with the rows of empty prompts taken from ``null`` ``(B, ...)``."""
    empty = torch.tensor([prompt == "" for prompt in prompts], device=encoded.device)
    return torch.where(empty.view(-1, *([1] * (encoded.ndim - 1))), null, encoded)


def sizes_and_dtype(shape: Shape) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the sizes and the dtype of a row that `wadi.backbones.Backbone.condition_shapes` states; float32 by default."""
    if len(shape) == 2 and isinstance(shape[1], torch.dtype):
        return cast(tuple[tuple[int, ...], torch.dtype], shape)
    return cast(tuple[int, ...], shape), torch.float32


def from_list(rows: Sequence[Tensor], tokens: int) -> dict[str, Tensor]:
    """Return embeddings of any number of tokens, ``(length, width)`` each, as tensors of a `Condition`. See `as_list`.

    A condition has a row for each prompt, and rows are joined, cut and cached, so all must have one length.

    Args:
        tokens: length of all rows: the most that the pipeline's call encodes.
    Returns:
        ``prompt_embeds`` ``(B, tokens, width)`` with zeros as padding, and ``mask`` ``(B, tokens)``, bool. The names matter:
        a cache of embeddings leaves out what ``mask`` hides.
    """
    embeds = torch.stack([pad(row, (0, 0, 0, tokens - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    return {"prompt_embeds": embeds, "mask": torch.arange(tokens, device=embeds.device) < lengths[:, None]}


def as_list(condition: Condition) -> list[Tensor]:
    """Return the embeddings that `from_list` padded, each of its own length.

    `wadi plan` has tensors without contents. There each row has all its tokens, which needs the most memory.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    embeds, mask = condition.tensors["prompt_embeds"], condition.tensors["mask"].bool()
    if isinstance(mask, FakeTensor):
        return list(embeds)
    return [row[seen] for row, seen in zip(embeds, mask, strict=True)]
