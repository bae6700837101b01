"""``wadi import-authors``: turn the weights that the authors released into a one-step pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi import-authors``."""
    add = parser.add_argument
    add("file", help="rotated_unet*.safetensors or rotated_transformer.safetensors, as the authors released it")
    add("--base", type=str, required=True, help="pipeline that the weights belong to: folder or Hub id")
    add("--out", type=str, required=True, help="pipeline folder to write; it must not exist")
    add("--dtype", type=str, default="float32", help="type of the weights: float32, bfloat16 or float16")


def run(arguments: Arguments) -> int:
    """Write the pipeline."""
    from wadi.backbones.saving import loading_line
    from wadi.convert.authors import import_authors
    from wadi.parallel.device import dtype_of

    options = arguments.options
    pipeline = import_authors(Path(options.file), options.base, Path(options.out), dtype_of(options.dtype))
    print(f"{options.out}: {loading_line(pipeline, Path(options.out))}")
    return 0
