"""The options of ``wadi generate``: their help, and what they put on the pipeline (`wadi.pipelines.compose`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from wadi.cli.family import add_family
from wadi.errors import WadiError
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, SCALE, SEED, SIDE, STEPS, Number, Whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.extras.high_resolution.blocks import Factor
    from wadi.pipelines.compose import Composition

NUMBER = r"\d{1,6}(?:\.\d{1,6})?"
MODE = Whole(0, 1000)
STRENGTH = 0.8  # of --init


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi generate``."""
    add = parser.add_argument_group("prompts and output").add_argument
    add("prompt", nargs="?", default=None, help="prompt of the image")
    add("--prompts", default=None, help="text file with one prompt a line; --out is then a folder")
    add("--out", type=str, default="wadi.png", help="PNG file, which is replaced; with --prompts a folder")
    add("--overwrite", action="store_true", help="with --prompts: replace images in --out that have other settings")
    add("--seed", type=SEED, default=0, help="seed of the first image; it counts up")
    add("--count", type=COUNT, default=1, help="images per prompt")
    add("--batch", type=BATCH, default=8, help="images generated at once; changes memory and speed, not the images")
    add = parser.add_argument_group("model").add_argument
    run = "folder of a run or of an exported pipeline; default: the embedded student"
    add("--run", type=str, default=None, help=run)
    adapter = "folder or Hub id of a student's adapter, in place of --run, or FOLDER:SCALE; repeat it to combine several"
    add("--adapter", type=str, action="append", default=None, help=adapter)
    teacher = "pipeline folder or Hub id that the adapter is merged into; default: the one of the training"
    add("--teacher", type=str, default=None, help=teacher)
    add("--dtype", type=str, default="float32", help="type of the weights: float32, bfloat16 or float16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add = parser.add_argument_group("steps and start image").add_argument
    add(
        "--steps", type=STEPS, default=None, help="steps of the student; default: those that it was trained for (docs/steps.md)"
    )
    add("--init", type=str, default=None, help="image to start from")
    strength = f"how far to leave --init, above 0 (not at all) up to 1; default: {STRENGTH}"
    add("--strength", type=Number(0, 1, above=True), default=None, help=strength)
    _add_size(parser)
    _add_files(parser)
    add = parser.add_argument_group("comparison with the teacher").add_argument
    add("--compare", action="store_true", help="show the teacher's many-step images above the student's, with both times")
    add("--teacher-steps", type=STEPS, default=None, help="steps of the teacher; default: 25")
    guidance = "guidance of the teacher; default: 2, for FLUX 1 (none)"
    add("--guidance-scale", type=GUIDANCE, default=None, help=guidance)
    add_family(parser)


def _add_size(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("size").add_argument
    size = "WIDTHxHEIGHT in pixels, also beyond the size of the training (docs/highres.md); default: that size"
    add("--size", type=str, default=None, help=size)
    redilate = "with --size: factor by which convolutions see further, D or DOWNxACROSS; 1 = not; default: as the size needs"
    add("--redilate", type=str, default=None, help=redilate)
    blocks = "with --size: blocks that see further, or all; default: the deepest"
    add("--redilate-blocks", nargs="+", default=None, help=blocks)
    add("--disperse", action="store_true", help="with --size: use dispersed kernels, made for a factor of two")
    add("--tiled-vae", action="store_true", help="decode in tiles, which saves memory; always on above a megapixel")


def _add_files(parser: ArgumentParser) -> None:
    many: dict[str, Any] = {"action": "append", "default": None}
    add = parser.add_argument_group("LoRA and token; repeat an option for several").add_argument
    add("--lora", type=str, **many, help="LoRA, or adapter of a customised teacher, to put into the weights, or FILE:SCALE")
    add("--lora-scale", type=str, **many, help="scale of each --lora, if they have none of their own; default: 1")
    add("--token", type=str, **many, help="file of a learned token (textual inversion) to use in prompts")
    add("--token-name", type=str, **many, help="name of each --token in prompts, such as '<R>'; default: the file's")
    add = parser.add_argument_group("control; repeat an option for several").add_argument
    add("--control", type=str, **many, help="ControlNet, T2I-Adapter or IP-Adapter: zoo, folder, Hub id or file")
    add("--condition", type=str, **many, help="condition image of each --control")
    kinds = "turn each --condition into this kind first: canny, scribble, depth, pose, or none; default: none"
    add("--condition-from", type=str, **many, help=kinds)
    add("--control-scale", type=str, **many, help="strength of each --control; default: 1")
    add("--control-mode", type=str, **many, help="number of the kind of condition, for a union ControlNet of FLUX")
    encoder = "folder of the CLIP vision model of an IP-Adapter; default: near the adapter's file"
    add("--image-encoder", type=str, default=None, help=encoder)


def composition_from(options: Any, size: tuple[int, int] | None) -> Composition:
    """Return everything to put on the pipeline. ``size`` is ``(height, width)`` from `size_from`.

    Raises:
        WadiError: if a number is out of bounds.
    """
    redilate = factor_from(options.redilate)
    tokens, loras, controls = options.token or [], options.lora or [], options.control or []
    names = options.token_name or [None] * len(tokens)
    lora_scales = numbers(options, "lora_scale", SCALE) or [1.0] * len(loras)
    control_scales = numbers(options, "control_scale", SCALE) or [1.0] * len(controls)
    modes = numbers(options, "control_mode", MODE) or [None] * len(controls)
    kinds = options.condition_from or ["none"] * len(controls)
    from wadi.pipelines.compose import Composition, Control, Lora, Token

    blocks = options.redilate_blocks
    return Composition(
        tokens=[Token(*token) for token in zip(tokens, names, strict=True)],
        loras=[Lora(*lora) for lora in zip(loras, lora_scales, strict=True)],
        controls=[
            Control(*control) for control in zip(controls, options.condition or [], kinds, control_scales, modes, strict=True)
        ],
        image_encoder=options.image_encoder,
        size=size,
        redilate=redilate,
        redilate_blocks="all" if blocks == ["all"] else blocks,
        disperse=options.disperse,
        tiled_vae=options.tiled_vae,
        steps=options.steps,
        init=options.init,
        strength=strength_from(options),
    )


def strength_from(options: Any) -> float:
    """Return ``--strength`` or its default; 1 without ``--init``."""
    if options.init is None:
        return 1.0
    return STRENGTH if options.strength is None else float(options.strength)


def numbers(options: Any, name: str, bounds: Number | Whole) -> list[Any]:
    """Return the numbers of an option that can be repeated; an empty list if it was not given.

    Raises:
        WadiError: if one is not a number or out of bounds.
    """
    for text in getattr(options, name) or ():
        bounds.check(name.replace("_", "-"), text)
    return [bounds(text) for text in getattr(options, name) or ()]


def size_from(text: str | None, smallest: int = 8) -> tuple[int, int] | None:
    """Return ``(height, width)`` for ``WIDTHxHEIGHT``.

    Args:
        smallest: of a side, in pixels. The autoencoder of every family has at least 8 pixels per latent.
    Raises:
        WadiError: if the text has another form, or a side is out of bounds.
    """
    if text is None:
        return None
    sides = re.fullmatch(r"(\d{1,18})x(\d{1,18})", text.lower())
    if not sides:
        raise WadiError(f"--size is {text[:80]!r}. Expected WIDTHxHEIGHT in pixels, such as 1792x1024.")
    width, height = int(sides[1]), int(sides[2])
    if not all(smallest <= side <= SIDE.high for side in (width, height)):
        raise WadiError(f"--size is {text!r}. Each side must be from {smallest} to {SIDE.high:,} pixels.")
    return height, width


def factor_from(text: str | None) -> Factor | None:
    """Return the factor of ``--redilate``: one number, or ``(down, across)`` for ``DOWNxACROSS``.

    Raises:
        WadiError: if the text has another form, or a factor is below 1.
    """
    if text is None:
        return None
    from wadi.extras.high_resolution.blocks import factor_pair

    if re.fullmatch(NUMBER, text):
        factor_pair(float(text))
        return float(text)
    if axes := re.fullmatch(f"({NUMBER})x({NUMBER})", text.lower()):
        return factor_pair((float(axes[1]), float(axes[2])))
    raise WadiError(
        f"--redilate is {text!r}. Give a factor of at least 1, such as 2 or 1.5, or one for each axis, such as 2x3.5."
    )
