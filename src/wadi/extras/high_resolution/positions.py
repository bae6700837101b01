"""Positions of transformers in pictures of another size: their own range, more finely divided (position interpolation).

Transformers have no convolutions that could be re-dilated. In place of positions beyond those it has seen, the network is given
the positions it knows. FLUX: rotary positions are divided by the growth of each axis. Stable Diffusion 3: the part of the
learnt table that belongs to its own size is interpolated. PixArt's own code scales its sine positions; Sana has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.extras.high_resolution.redilation import answering

ROTARY = ("FluxTransformer", "FluxControlNet")
TABLE = ("SD3Transformer", "SD3ControlNet")


@contextmanager
def interpolated_positions(network: Any, native: tuple[int, int], wanted: tuple[int, int]) -> Iterator[None]:
    """Within the block a transformer finds its own range of positions in a larger picture; PixArt and Sana are left alone.

    Args:
        native, wanted: ``(height, width)`` in tokens.
    Raises:
        WadiError: if the family is another.
    """
    kind = type(network).__name__
    if not kind.startswith(("PixArt", "Sana", *ROTARY, *TABLE)):
        raise WadiError(
            f"{kind} has positions that are not known here. Expected a U-Net, or the transformer of FLUX, Stable Diffusion 3, "
            "PixArt or Sana; with a factor of 1 it draws at another size as it is."
        )
    grown, embed = (wanted[0] / native[0], wanted[1] / native[1]), getattr(network, "pos_embed", None)
    if embed is None or max(grown) <= 1 or kind.startswith(("PixArt", "Sana")):
        yield
    elif kind.startswith(ROTARY):
        with answering("pos_embed", embed, lambda ids: rotary(embed, ids, grown)):
            yield
    else:
        table = embed.cropped_pos_embed(*(side * embed.patch_size for side in native))
        stretched = resized_table(table, native, wanted)
        with answering("pos_embed", embed, lambda height, width: stretched, "cropped_pos_embed"):
            yield


def rotary(embed: nn.Module, ids: Tensor, grown: tuple[float, float]) -> Any:
    """Rotary embedding of ``ids (tokens, 3)``, whose last two numbers are row and column, each divided by its growth."""
    shrunk = torch.tensor([1.0, *(max(1.0, g) for g in grown)], device=ids.device)
    return type(embed).forward(embed, ids.float() / shrunk)


def resized_table(table: Tensor, native: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions ``(1, h w, C)`` of a ``native`` grid at the places of a ``wanted`` one, ``(1, h' w', C)``."""
    grid = table.unflatten(1, native).permute(0, 3, 1, 2)
    resized = F.interpolate(grid.float(), size=wanted, mode="bilinear").to(table.dtype)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)
