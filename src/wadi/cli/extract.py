"""``wadi extract``: make an adapter from a teacher and a student that was trained in another way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli.family import add_family
from wadi.io.bounds import RANK, TIMESTEP, Whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi extract``."""
    add = parser.add_argument
    add("teacher", help="pipeline folder or Hub id")
    add("student", help="pipeline folder or Hub id, or a safetensors file of the network alone")
    add("--rank", type=RANK, default=256, help="rank of the angles")
    add("--out", type=str, required=True, help="adapter folder to write; it must not exist")
    add("--target-modules", type=str, default=None, help="regular expression over layer names; default: that of the family")
    add("--timestep", type=Whole(1, TIMESTEP.high), default=None, help="timestep of the student; default: from its scheduler")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Write the adapter and print what changed between the two checkpoints."""
    from wadi.convert.extract import describe, extract

    options = arguments.options
    extracted = extract(
        options.teacher, options.student, options.rank, Path(options.out), options.target_modules, options.timestep
    )
    print(f"{describe(extracted)}\nadapter  {options.out}")
    return 0
