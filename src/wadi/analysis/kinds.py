"""Kinds of layers, and their position along the network, by their names in the U-Nets and transformers of diffusers."""

from __future__ import annotations

import re

# (kind, pattern to search in the name): the first match counts.
_RULES = (
    ("feed-forward", r"\.(ff|ff_context|mlp)\.|(^|\.)single_transformer_blocks\.\d+\.proj_(mlp|out)$"),
    ("cross-attention", r"\.attn2\."),
    (
        "text-stream attention",
        r"\.attn1?\.(add_[qkv]_proj|to_add_out)",
    ),  # of transformers that attend to text and image jointly
    ("self-attention q", r"\.to_q$"),
    ("self-attention k", r"\.to_k$"),
    ("self-attention v", r"\.to_v$"),
    ("self-attention out", r"\.to_out(\.0)?$"),
    ("time", r"time_|timestep|adaln|add_embedding|class_embedding|guidance_embed|(^|\.)norm\w*\.linear(_\d)?$"),
    ("projection", r"(^|\.)(proj_in|proj_out|proj|x_embedder|context_embedder)$|caption_projection|encoder_hid_proj"),
    ("convolution", r"(^|\.)conv(_?\w*)?$"),
)
KINDS = (
    "self-attention q", "self-attention k", "self-attention v", "self-attention out", "cross-attention",
    "text-stream attention", "feed-forward", "convolution", "time", "projection", "other",
)  # fmt: skip

_BLOCK = re.compile(r"^(down_blocks|up_blocks|transformer_blocks|single_transformer_blocks)\.(\d+)\.|^(mid_block)\.")
_PLACES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up", "transformer_blocks": "block"}


def kind(name: str, dimensions: int = 2) -> str:
    """Return one of `KINDS` for the name of a layer (without ``.weight``).

    Args:
        dimensions: of its weight; more than 2 means a convolution.
    """
    for layer_kind, pattern in _RULES:
        if re.search(pattern, name):
            return layer_kind
    return "convolution" if dimensions > 2 else "other"


def block(name: str) -> str:
    """Return the block of a layer.

    In a U-Net it is ``down 0``, ``mid`` or ``up 2``, in a transformer ``block 7`` or ``single 7``, and otherwise ``outside``.
    """
    match = _BLOCK.match(name)
    if not match:
        return "outside"
    place = match[1] or match[3]
    return f"{_PLACES.get(place, 'single')} {match[2]}" if match[2] else _PLACES[place]


_ORDER = ("outside", "down", "mid", "up", "block", "single")


def depth(name: str) -> tuple[int, int, list[tuple[int, int, str]]]:
    """Return a key that sorts layers from input to output. Layers outside the blocks come first."""
    place, _, number = block(name).partition(" ")
    natural = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
    return _ORDER.index(place), int(number or 0), natural
