"""``wadi export``: write a one-step pipeline that loads without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi export``."""
    add = parser.add_argument
    add("--run", type=str, default=None, help="folder of the run whose student is exported; default: the embedded student")
    add("--adapter", type=str, default=None, help="folder of a student's adapter, in place of --run")
    add(
        "--teacher",
        type=str,
        default=None,
        help="pipeline folder or Hub id that the rotation is applied to; default: as trained",
    )
    add("--out", type=str, required=True, help="folder to write; it must not exist")
    add("--dtype", type=str, default="float32", help="type of the weights: float32, bfloat16 or float16")
    add("--device", type=str, default="cpu", help="where to merge the rotation: cpu, cuda, cuda:1, ...")


def run(arguments: Arguments) -> int:
    """Merge the rotation into the teacher's weights and save the pipeline."""
    from wadi.backbones.saving import loading_line, save_pipeline
    from wadi.cli.generate import load_student
    from wadi.io.outputs import check_out

    out = Path(arguments.options.out)
    check_out(out)
    pipeline = load_student(arguments.options)
    save_pipeline(pipeline, out)
    print(f"{out}: {loading_line(pipeline, out)}")
    return 0
