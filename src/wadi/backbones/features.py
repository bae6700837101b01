"""Intermediate features of a network: the output of its middle block, for objectives that compare images in feature space.

U-Net           ``mid_block``, one token per position of its feature map
transformer     the middle one of ``transformer_blocks``, the tokens of the image
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wadi.errors import WadiError


def middle_block(network: Any) -> nn.Module:
    """Return the block whose output are the features.

    Raises:
        WadiError: if the network has neither ``mid_block`` nor ``transformer_blocks``.
    """
    block = getattr(network, "mid_block", None)
    if block is None:
        blocks = getattr(network, "transformer_blocks", None) or [None]
        block = blocks[len(blocks) // 2]
    if not isinstance(block, nn.Module):
        raise WadiError(
            f"{type(network).__name__} has no middle block whose features could be used: it needs mid_block or "
            "transformer_blocks. Choose an objective without a GAN (gan_weight 0)."
        )
    return block


def width(network: Any) -> int:
    """Return the number of channels of the features, from the network's config."""
    middle_block(network)
    config = network.config
    if config.get("block_out_channels"):
        return int(config.block_out_channels[-1])
    return int(config.num_attention_heads * config.attention_head_dim)


@contextmanager
def captured(network: Any) -> Iterator[list[Tensor]]:
    """Within the block, collect the features of each evaluation of ``network``, ``(B, tokens, width)`` float32 each."""
    collected: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        # blocks that also return the tokens of the prompt return those of the image last
        tokens: Tensor = output[-1] if isinstance(output, tuple) else output
        collected.append((tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens).float())

    handle = middle_block(network).register_forward_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()
