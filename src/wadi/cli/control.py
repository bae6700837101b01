"""``wadi control``: make condition images, train ControlNets, evaluate them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli import control_eval, control_train
from wadi.cli.generate_options import size_from
from wadi.cli.parser import Command

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def _add_condition_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("picture", help="image file")
    add("--kind", type=str, default="canny", help="kind of condition: canny, scribble, depth or pose")
    add("--model", type=str, default=None, help="folder or Hub id of the network for depth or pose; default: a small one")
    add("--size", type=str, default=None, help="WIDTHxHEIGHT to resize the image to first: edges do not survive resizing later")
    add("--out", type=str, default="condition.png", help="PNG file to write")


def _condition(arguments: Arguments) -> int:
    import torch

    from wadi.extras.control.condition_images import fit_image
    from wadi.extras.control.conditions import condition
    from wadi.io.grids import save_png
    from wadi.io.images import read_image
    from wadi.io.outputs import check_writable
    from wadi.parallel.device import explained_when_full

    options = arguments.options
    check_writable(options.out, (".png",))
    image = read_image(options.picture, "Condition image")
    if (size := size_from(options.size, smallest=1)) is not None:
        image = fit_image(image, size)
    doing = f"{options.kind} of {image.width} x {image.height} pixels"
    with explained_when_full(torch.device("cpu"), lambda: doing, "Give --size with fewer pixels."):
        result = condition(options.kind, image, options.model)
    save_png(result, Path(options.out))
    print(options.out)
    return 0


SUBCOMMANDS = {
    "condition": Command("turn an image into edges, a scribble, depth or a pose", _add_condition_options, _condition),
    "train": Command(
        "train a ControlNet on images of a teacher, or against a student", control_train.add_options, control_train.run
    ),
    "eval": Command(
        "evaluate how well teacher and student follow a ControlNet's edges", control_eval.add_options, control_eval.run
    ),
}
