"""``wadi zoo``: train the embedded teacher, list its prompts, embed a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli.parser import Command
from wadi.errors import WadiError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def _add_train_options(parser: ArgumentParser) -> None:
    from wadi.zoo.recipe.config import ZooConfig

    parser.add_class_arguments(ZooConfig)


def _train(arguments: Arguments) -> int:
    from wadi.zoo.recipe.config import ZooConfig
    from wadi.zoo.recipe.stages import train

    print(train(ZooConfig(**arguments.options.as_dict())))
    return 0


def _add_no_options(parser: ArgumentParser) -> None:
    pass


def _prompts(arguments: Arguments) -> int:
    from wadi.zoo import training_prompts

    print("\n".join(training_prompts()))
    return 0


def _add_ship_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="run of the embedded teacher; its student becomes the embedded one")
    parser.add_argument("--weights", type=str, required=True, help="folder of the embedded weights: src/wadi/zoo/weights")


def _ship(arguments: Arguments) -> int:
    from wadi.roles import read_about
    from wadi.zoo.paths import NAME
    from wadi.zoo.recipe.export import export_student

    options = arguments.options
    teacher = read_about(Path(options.run) / "student").teacher
    if teacher != NAME:
        raise WadiError(f"The teacher of run {options.run!r} is {teacher!r}. Give a run of --teacher {NAME}.")
    print(export_student(Path(options.run), Path(options.weights)))
    return 0


SUBCOMMANDS = {
    "train": Command("train the embedded teacher, from its sprites to its classifier", _add_train_options, _train),
    "prompts": Command("list the prompts that the embedded teacher was trained on", _add_no_options, _prompts),
    "ship": Command("make the student of a run the embedded one", _add_ship_options, _ship),
}
