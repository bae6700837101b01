"""The option ``--family`` of all commands that open a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_family(parser: ArgumentParser) -> None:
    """Add ``--family``. The commands that take the settings of a run have it from them."""
    add: Any = parser.add_argument_group("model family").add_argument
    what = "Python file that registers the family of the pipeline (docs/add-a-family.md); default: the one that the run names"
    add("--family", type=str, default=None, help=what)


def load_family(arguments: Arguments) -> None:
    """Run the file of ``--family``, and make its path absolute. A file that only settings name must have been named before.

    Raises:
        WadiError: if the file cannot be used.
    """
    options = arguments.options
    if getattr(options, "family", None) is None:
        return
    from wadi.backbones.family_files import name_family, use_family

    if "family" in arguments.named:
        options.family = str(name_family(options.family))
    else:
        use_family(options.family, "The configuration")
