"""``wadi swap``: write a student with the teacher's norms or directions put back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli.family import add_family

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi swap``."""
    add = parser.add_argument
    add("teacher", help="pipeline folder, Hub id, .safetensors state dict of the network, or zoo")
    add("student", help="a run, an adapter folder, an exported or other pipeline, or zoo")
    add("--take", type=str, required=True, help="what the teacher gives: norm or direction")
    add("--layers", type=str, default=".*", help="regular expression that matches the whole names of the layers to change")
    add("--out", type=str, required=True, help="pipeline folder to write; it must not exist")
    add("--dtype", type=str, default="float32", help="type of the weights: float32, bfloat16 or float16")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Load the hybrid and save it as a pipeline."""
    from wadi.analysis.sources import open_teacher
    from wadi.analysis.swap import matching
    from wadi.backbones.saving import loading_line, save_pipeline
    from wadi.io.outputs import check_out
    from wadi.parallel.device import dtype_of
    from wadi.pipelines.hybrid import load_hybrid

    options = arguments.options
    out, matches = Path(options.out), matching(options.layers)
    check_out(out)
    dtype = dtype_of(options.dtype)
    weights = open_teacher(options.teacher)
    pipeline, changed = load_hybrid(options.teacher, options.student, weights, options.take, matches, dtype)
    save_pipeline(pipeline, out)
    print(f"{len(changed)} layers with the teacher's {options.take}s\n{out}: {loading_line(pipeline, out)}")
    return 0
