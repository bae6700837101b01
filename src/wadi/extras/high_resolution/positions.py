"""Position interpolation: a transformer finds the positions of its training size in an image of another size.

Transformers have no convolutions to re-dilate. Instead of positions beyond its training range, the network gets positions
within that range, more finely divided. FLUX and Chroma: rotary positions are divided by the growth of each axis. Stable
Diffusion 3: the part of the learned table that belongs to the training size is interpolated. PixArt's own code scales its sine
positions; Sana has no positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wadi.errors import WadiError
from wadi.extras.high_resolution.replace import replaced_method

ROTARY = ("FluxTransformer", "FluxControlNet", "ChromaTransformer")
TABLE = ("SD3Transformer", "SD3ControlNet")
UNCHANGED = ("PixArt", "Sana")


@contextmanager
def interpolated_positions(network: Any, native: tuple[int, int], target: tuple[int, int]) -> Iterator[None]:
    """Interpolate the positions of a transformer within the block; PixArt and Sana need no change.

    Args:
        native, target: ``(height, width)`` in tokens, at training and now.
    Raises:
        WadiError: if the family is another one.
    """
    kind = type(network).__name__
    if not kind.startswith((*UNCHANGED, *ROTARY, *TABLE)):
        raise WadiError(
            f"The kind of positions in a {kind} is unknown here. Give a U-Net, or the transformer of FLUX, Chroma, Stable "
            "Diffusion 3, PixArt or Sana. With a factor of 1 it generates at another size without a change."
        )
    grown, embed = (target[0] / native[0], target[1] / native[1]), getattr(network, "pos_embed", None)
    if embed is None or max(grown) <= 1 or kind.startswith(UNCHANGED):
        yield
    elif kind.startswith(ROTARY):
        with replaced_method("pos_embed", embed, lambda ids: rotary_embedding(embed, ids, grown)):
            yield
    else:
        table = embed.cropped_pos_embed(*(side * embed.patch_size for side in native))
        resized = resized_table(table, native, target)
        with replaced_method("pos_embed", embed, lambda height, width: resized, "cropped_pos_embed"):
            yield


def rotary_embedding(embed: nn.Module, ids: Tensor, grown: tuple[float, float]) -> Any:
    """Return the rotary embedding of ``ids (tokens, 3)``, whose row and column (the last two) are divided by their growth."""
    shrunk = torch.tensor([1.0, *(max(1.0, g) for g in grown)], device=ids.device)
    return type(embed).forward(embed, ids.float() / shrunk)


def resized_table(table: Tensor, native: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Return positions ``(1, h w, C)`` of a ``native`` grid, interpolated to a ``target`` one, ``(1, h' w', C)``."""
    grid = table.unflatten(1, native).permute(0, 3, 1, 2)
    resized = F.interpolate(grid.float(), size=target, mode="bilinear").to(table.dtype)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)
