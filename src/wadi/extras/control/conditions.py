"""Make condition images for ControlNets and T2I-Adapters from ordinary images.

`edges` needs torch alone; `estimators` needs a network of `transformers`. Each kind takes an image and returns an 8-bit RGB
image of the same size.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from wadi.errors import WadiError
from wadi.extras.control.condition_images import finished_condition
from wadi.extras.control.edges import canny, scribble
from wadi.extras.control.estimators import depth, pose

__all__ = ["KINDS", "canny", "condition", "depth", "pose", "scribble"]

KINDS: dict[str, Callable[..., Image.Image]] = {"canny": canny, "scribble": scribble, "depth": depth, "pose": pose}
WITH_NETWORK = ("depth", "pose")


def condition(kind: str, image: Image.Image, model: str | None = None) -> Image.Image:
    """Return the condition image of an image.

    Args:
        kind: one of `KINDS`, or ``'none'`` if ``image`` is a condition already.
        model: folder or Hub id of the network for depth or pose; None = the default one.
    Raises:
        WadiError: if the kind is unknown, or a model is given for a kind that uses none.
    """
    if kind == "none":
        return finished_condition(image)
    if kind not in KINDS:
        raise WadiError(f"The kind of condition is {kind!r}. Choose {', '.join(KINDS)}, or none for a finished condition.")
    if model is None:
        return KINDS[kind](image)
    if kind not in WITH_NETWORK:
        raise WadiError(f"The model {model} was given for {kind!r}, but only {' and '.join(WITH_NETWORK)} use a model.")
    return KINDS[kind](image, model)
