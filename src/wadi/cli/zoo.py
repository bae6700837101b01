"""``wadi zoo``: make the embedded teacher, its captions, its embedded student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wadi.errors import WadiError

USAGE = "wadi zoo train | prompts | ship"


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """Run one of the subcommands; ``parse`` and ``make_parser`` are the command line's own."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}    (wadi zoo train --help tells the options)")
        return 0 if argv else 2
    commands = {"train": _train, "prompts": _prompts, "ship": _ship}
    if argv[0] not in commands:
        raise WadiError(f"There is no command 'zoo {argv[0]}'. Expected {USAGE}.")
    return commands[argv[0]](argv[1:], parse, make_parser)


def _train(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    from wadi.zoo.recipe.stages import ZooConfig, train

    parser = make_parser("zoo")
    parser.prog = "wadi zoo train"
    parser.add_class_arguments(ZooConfig)
    print(train(ZooConfig(**parse(parser, argv).as_dict())))
    return 0


def _prompts(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    from wadi.zoo import training_prompts

    parser = make_parser("zoo")
    parser.prog = "wadi zoo prompts"
    parse(parser, argv)
    print("\n".join(training_prompts()))
    return 0


def _ship(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    from wadi.roles import read_about
    from wadi.zoo.paths import NAME
    from wadi.zoo.recipe.export import export_student

    parser = make_parser("zoo")
    parser.prog = "wadi zoo ship"
    parser.add_argument("run", help="run of the embedded teacher, whose student is to be the embedded one")
    parser.add_argument("--weights", type=str, required=True, help="folder of the embedded weights: src/wadi/zoo/weights")
    args = parse(parser, argv)
    teacher = read_about(Path(args.run) / "student").teacher
    if teacher != NAME:
        raise WadiError(f"Run {args.run!r} is of the teacher {teacher!r}. Give a run of the embedded teacher (--teacher zoo).")
    print(export_student(Path(args.run), Path(args.weights)))
    return 0
