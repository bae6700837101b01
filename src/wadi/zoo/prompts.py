"""The teacher's captions of concept, style and background, and the fixed lists of prompts made from them.

All of this is plain Python and depends only on its seeds.
"""

from __future__ import annotations

import itertools
import random

from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES

EVAL_COUNT = 512
EVAL_PAIRS = 256
AND = "and"  # between two concepts


def caption(concept: str, style: str | None = None, colour: str | None = None) -> str:
    """Return a caption: ``caption("pizza", "noto", "blue")`` is "pizza, noto style, on a blue background".

    Without a style or a colour that part is left out.
    """
    parts = [concept]
    if style is not None:
        parts.append(f"{style} style")
    if colour is not None:
        parts.append(f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background")
    return ", ".join(parts)


def pair(first: str, second: str) -> str:
    """Return what a caption calls two things: ``pair("panda", "lemon")`` is "panda and lemon"."""
    return f"{first} {AND} {second}"


def concepts_of(prompt: str) -> list[str]:
    """Return the one or two concepts that a caption names."""
    return concept_of(prompt).split(f" {AND} ")


def concept_of(prompt: str) -> str:
    """Return the concept that a caption names: the text before its first comma."""
    return prompt.split(",")[0].strip()


def training_prompts() -> list[str]:
    """Return all captions in a fixed order: concepts x (no style or one) x (no background or one)."""
    choices = itertools.product(CONCEPTS, (None, *STYLES), (None, *COLOURS))
    return [caption(concept, style, colour) for concept, style, colour in choices]


def eval_prompts() -> list[tuple[str, str, int]]:
    """Return the ``EVAL_COUNT`` fixed ``(prompt, concept, seed)`` of the evaluation. The concepts take turns."""
    draw = random.Random("eval prompts")
    styles, colours = list(STYLES), list(COLOURS)
    rows = []
    for seed, concept in zip(range(EVAL_COUNT), itertools.cycle(CONCEPTS)):
        style = draw.choice(styles) if draw.random() < 0.5 else None
        colour = draw.choice(colours) if draw.random() < 0.5 else None
        rows.append((caption(concept, style, colour), concept, seed))
    return rows


def eval_pair_prompts() -> list[tuple[str, tuple[str, str], int]]:
    """Return the ``EVAL_PAIRS`` fixed ``(prompt, two concepts, seed)`` of the evaluation of a teacher that knows pairs."""
    draw = random.Random("eval pair prompts")
    names, styles, colours = list(CONCEPTS), list(STYLES), list(COLOURS)
    rows = []
    for seed in range(EVAL_PAIRS):
        first, second = draw.sample(names, 2)
        style = draw.choice(styles) if draw.random() < 0.5 else None
        colour = draw.choice(colours) if draw.random() < 0.5 else None
        rows.append((caption(pair(first, second), style, colour), (first, second), seed))
    return rows


def fixed_pair_prompts() -> list[str]:
    """Return half a dozen prompts of two things for grids."""
    return [
        "panda and lemon, on a pink background",
        "rocket and banana, on a blue background",
        "cat face and pizza, noto style",
        "fox and umbrella, twemoji style, on a white background",
        "robot and strawberry, fluent style, on a green background",
        "penguin and guitar",
    ]


def fixed_prompts() -> list[str]:
    """Return a dozen prompts for grids."""
    return [
        "red apple",
        "pizza, noto style, on a blue background",
        "rocket, on a black background",
        "cat face, fluent style",
        "penguin, on a pink background",
        "sunflower, twemoji style, on a green background",
        "hamburger, on a yellow background",
        "fox, noto style, on a purple background",
        "sailboat, twemoji style",
        "strawberry, fluent style, on a white background",
        "guitar, noto style, on an orange background",
        "octopus, on a grey background",
    ]
