"""Start a command by its name. ``wadi --help`` imports neither torch nor a parser: each command does when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wadi.cli.guard import BAD_INPUT, check_decodable, forgiving_output, guard, split_debug
from wadi.errors import WadiError
from wadi.io.quiet import quiet_libraries

if TYPE_CHECKING:
    from wadi.cli.parser import Command

# The command NAME is in the file NAME.py of this folder.
COMMANDS = {
    "distill": "train a student of one or a few steps; the same command continues an interrupted run",
    "plan": "show what a run would train and how much memory it needs, without loading weights",
    "embed": "encode prompts once, into a cache that distill trains from",
    "generate": "generate images with a student",
    "export": "write a student in a form that other programs read: pipeline, adapter, LoRA, checkpoint, ONNX, OpenVINO",
    "extract": "make an adapter from two checkpoints, and report what changed between them",
    "import-authors": "turn the weights that the authors released into a one-step pipeline",
    "analyze": "report what distillation changed in the weights: norms, directions, ranks, angles",
    "swap": "write a student with the teacher's norms or directions put back, as a pipeline",
    "eval": "evaluate images, or those that a run generates by a protocol; compare results",
    "control": "make condition images, train and evaluate ControlNets for a teacher or a student",
    "invert-relation": "learn a token for a relation from images that share it",
    "dreambooth": "teach a model one subject from a few images; its one-step student can then generate it",
    "study": "train, evaluate and analyse a grid of settings and seeds; collect one table",
    "report": "write report.html of a run",
    "app": "serve a web page: generate with students, look at runs while they train",
    "doctor": "show versions, devices, optional parts and folders of this installation",
    "zoo": "train the embedded teacher, list its prompts, embed a student",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 = success; 2 = bad input, reported in one line on stderr; 128 + n = stopped by signal n; 1 = unexpected failure, see
    `wadi.cli.guard`.
    """
    words, debug = split_debug(sys.argv[1:] if argv is None else argv)
    name = f"wadi {words[0]}" if words and words[0] in COMMANDS else "wadi"
    return guard(name, lambda: _start(words), debug)


def _start(words: list[str]) -> int:
    forgiving_output()
    quiet_libraries()
    check_decodable(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else BAD_INPUT
    if words[0] == "--version":
        from wadi import __version__

        print(f"wadi {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise WadiError(f"There is no command {words[0]!r}. The commands are {', '.join(COMMANDS)}: see `wadi --help`.")
    return _run_command(words[0], words[1:])


def _run_command(name: str, words: list[str]) -> int:
    from wadi.cli.parser import Command

    module = importlib.import_module(f"wadi.cli.{name.replace('-', '_')}")
    if hasattr(module, "SUBCOMMANDS"):
        return _run_subcommand(name, module.SUBCOMMANDS, words)
    command = Command(COMMANDS[name], module.add_options, module.run, getattr(module, "prepare", None))
    return command.start(name, words)


def _run_subcommand(name: str, subcommands: Mapping[str, Command], words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        table = columns({f"{name} {sub}": command.summary for sub, command in subcommands.items()})
        print(f"usage: wadi {name} SUBCOMMAND [options]    (wadi {name} SUBCOMMAND --help lists them)\n\n{table}")
        return 0 if words else BAD_INPUT
    if words[0] not in subcommands:
        raise WadiError(f"There is no command '{name} {words[0]}'. Use wadi {name} {' | '.join(subcommands)}.")
    return subcommands[words[0]].start(f"{name} {words[0]}", words[1:])


def overview() -> str:
    """Return what ``wadi --help`` prints."""
    return (
        "usage: wadi COMMAND [options]    (wadi COMMAND --help lists them)\n\n"
        "Train and use text-to-image generators of one or a few steps. Only small adapters are trained.\n\n"
        f"{columns(COMMANDS)}\n\n"
        "Bad input ends with one line and exit code 2, an unexpected failure with one line and exit code 1.\n"
        "--debug, anywhere on the line, prints the traceback as well. `wadi --version` prints the version."
    )


def columns(summaries: Mapping[str, str]) -> str:
    """Return names and summaries in two aligned columns."""
    width = max(map(len, summaries))
    return "\n".join(f"  {name:<{width}}  {summary}" for name, summary in summaries.items())


if __name__ == "__main__":
    sys.exit(main())
