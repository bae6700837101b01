"""The command line. ``wadi --help`` imports neither torch nor an argument parser's machinery: each command does, on use."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.guard import BAD_INPUT, LONGEST, forgiving_output, guard, refuse_undecodable, split_debug
from wadi.errors import WadiError
from wadi.io.bounds import PROCESSES, RANK, TIMESTEP, Whole
from wadi.io.quiet import quiet_libraries

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from wadi.distill.config import DistillConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 on bad input (one line on stderr), 128 + n after a stop by signal n.

    1 is an unexpected failure; see `wadi.cli.guard`.
    """
    arguments, debug = split_debug(sys.argv[1:] if argv is None else argv)
    command = f"wadi {arguments[0]}" if arguments and arguments[0] in COMMANDS else "wadi"
    return guard(command, lambda: _run(arguments), debug)


def _run(arguments: list[str]) -> int:
    forgiving_output()
    quiet_libraries()
    refuse_undecodable(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        from wadi import __version__

        print(f"wadi {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise WadiError(f"There is no command {arguments[0]!r}. Expected one of {', '.join(COMMANDS)}: see `wadi --help`.")
    return COMMANDS[arguments[0]][1](arguments[1:])


def overview() -> str:
    """What ``wadi --help`` prints."""
    commands = "\n".join(f"  {name:<14} {summary}" for name, (summary, _) in COMMANDS.items())
    return (
        "usage: wadi COMMAND [options]    (wadi COMMAND --help lists them)\n\n"
        "One-step text-to-image generators from diffusers pipelines, by training rotation angles only.\n\n"
        f"{commands}\n\n"
        "Bad input ends with one line and exit code 2, an unexpected failure with one line and exit code 1. --debug, anywhere\n"
        "on the line, prints the traceback as well. `wadi --version` prints the version."
    )


def _parser(command: str) -> ArgumentParser:
    import yaml
    from jsonargparse import ArgumentParser, set_loader

    set_loader(YAML_MODE, _bounded_yaml, (yaml.YAMLError,))
    what = COMMANDS[command][0]
    return ArgumentParser(prog=f"wadi {command}", description=what, exit_on_error=False, parser_mode=YAML_MODE)


YAML_MODE = "wadi"  # of the parser: jsonargparse's own YAML, of bounded depth and size


def _bounded_yaml(text: str) -> Any:
    """The value of an option as jsonargparse reads YAML, unless it is nested too deeply or its aliases have no bound."""
    from jsonargparse import get_loader

    from wadi.io.yaml_files import check_yaml_size

    check_yaml_size(text, "Its value")
    return get_loader("yaml")(text)


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command line; ``~`` at the start of a value, as in ``--out=~/runs``, becomes the home folder.

    Raises:
        WadiError: with the option and its value.
    """
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args([_at_home(word) for word in argv])
    except ArgumentError as error:
        reason = " ".join(str(getattr(error, "message", None) or error).split())
        reason = reason if len(reason) <= LONGEST else f"{reason[: LONGEST // 2]} ... {reason[-LONGEST // 2 :]}"
        raise WadiError(f"{reason.rstrip('.')}. See `{parser.prog} --help`.") from error
    except (ValueError, RecursionError) as error:  # what the parser's own YAML cannot read
        if isinstance(error, WadiError):
            raise
        reason = " ".join(str(error).split())[:LONGEST]
        raise WadiError(f"An option cannot be read: {reason}. See `{parser.prog} --help`.") from error


def _at_home(word: str) -> str:
    """``--out=~/runs`` with the home folder written out: shells leave ``~`` after ``=`` as it is."""
    return re.sub(r"^(--\w[\w.-]*=)(~(?:/.*)?)$", lambda found: found[1] + os.path.expanduser(found[2]), word)


# --- distill ----------------------------------------------------------------------------------------------------------------


def distill_config(argv: Sequence[str]) -> tuple[DistillConfig, bool]:
    """``(config, dry_run)`` of a ``distill`` command line: the preset, then YAML files, then flags; later ones win."""
    parser = _parser("distill")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")
    config, options = _settings(parser, argv)
    for name in ("teacher", "prompts", "out"):
        if not getattr(config, name):
            raise WadiError(f"--{name} is missing. Expected it from the command line, --config or --preset.")
    return config, bool(options["dry_run"])


def _settings(parser: ArgumentParser, argv: Sequence[str]) -> tuple[DistillConfig, dict[str, Any]]:
    """The settings of a run on a command line, and the command's own options apart.

    Flags win over files, wherever they stand; of several files the later one wins.
    """
    from wadi.distill.config import DistillConfig, flatten, from_dict, merged, read_settings, to_dict
    from wadi.distill.presets import PRESETS, preset

    parser.add_argument("--preset", default=None, help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument("--config", type=str, help="YAML or JSON file with some of the settings below; may be repeated")
    parser.add_class_arguments(DistillConfig)
    first = _values_of("--preset", argv)
    start = to_dict(preset(first[-1]) if first else DistillConfig())
    for file in _values_of("--config", argv):
        start = merged(start, read_settings(Path(os.path.expanduser(file))))
    for group in [name for name, value in start.items() if isinstance(value, dict)]:  # each takes a file too: `--student FILE`
        for value in _values_of(f"--{group}", argv):
            if os.path.lexists(file := os.path.expanduser(value)):
                start = merged(start, read_settings(Path(file), group))
                argv = _without(f"--{group}", value, argv)
    parser.set_defaults(flatten(start))
    values = _parse(parser, argv).as_dict()
    known = to_dict(DistillConfig())
    others = values.keys() - known.keys() - {"config"}
    return from_dict({name: values[name] for name in known}), {name: values[name] for name in others}


def _without(flag: str, value: str, argv: Sequence[str]) -> list[str]:
    """The words of a command line without ``--flag value`` and ``--flag=value``."""
    words, kept = iter(argv), list[str]()
    for word in words:
        following = next(words, None) if word == flag else None
        if following == value or word == f"{flag}={value}":
            continue
        kept += [word] if following is None else [word, following]
    return kept


def _values_of(flag: str, argv: Sequence[str]) -> list[str]:
    """All values given for ``flag``, as ``--flag value`` or ``--flag=value``."""
    found = []
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag and following is not None:
            found.append(following)
        elif word.startswith(flag + "="):
            found.append(word.partition("=")[2])
    return found


def _distill(argv: Sequence[str]) -> int:
    config, dry_run = distill_config(argv)
    if dry_run:
        import yaml

        from wadi.distill.config import to_dict

        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return 0
    from wadi.distill.loop import distill
    from wadi.distill.report import write_report
    from wadi.parallel.device import OutOfMemory

    try:
        folder = distill(config)
    except OutOfMemory as full:
        from wadi.distill.plan import fitting

        raise WadiError(f"{full} {fitting.advice(config, full.device, int(os.environ.get('WORLD_SIZE', '1')))}") from full
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one tells
        return 0
    report = write_report(folder)
    newest = max((folder / "samples").glob("step-*.png"))
    print(f"picture  {newest}\nreport   {report}\nstudent  {folder / 'student'}")
    return 0


# --- plan -------------------------------------------------------------------------------------------------------------------


def _plan(argv: Sequence[str]) -> int:
    parser = _parser("plan")
    parser.add_argument("--processes", type=PROCESSES, default=1, help="processes (GPUs) that the run will have")
    parser.add_argument("--json", action="store_true", help="print JSON, memory in bytes")
    config, options = _settings(parser, argv)
    import json

    from wadi.distill.plan import plan

    if config.teacher:
        found = plan.architecture_of(config.teacher)
    elif options["preset"] in plan.architectures():
        found = plan.architecture(options["preset"])
    else:
        known = ", ".join(plan.architectures())
        raise WadiError(f"Nothing to plan for. Expected --teacher FOLDER_OR_HUB_ID, or --preset with one of {known}.")
    planned = plan.plan(config, found, options["processes"])
    print(json.dumps(plan.to_dict(planned), indent=2) if options["json"] else plan.describe(planned))
    return 0


# --- students ---------------------------------------------------------------------------------------------------------------


def _generate(argv: Sequence[str]) -> int:
    from wadi.cli.generate import run

    return run(argv, _parse, _parser)


def _export(argv: Sequence[str]) -> int:
    parser = _parser("export")
    parser.add_argument("--run", type=str, default=None, help="folder of a run; default: the embedded student")
    parser.add_argument("--adapter", type=str, default=None, help="folder of a student's adapter")
    parser.add_argument("--teacher", type=str, default=None, help="pipeline folder or Hub id that the rotation is applied to")
    parser.add_argument("--out", type=str, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--device", type=str, default="cpu", help="where to merge")
    args = _parse(parser, argv)
    from wadi.backbones.saving import loading_line, save_pipeline
    from wadi.cli.generate import student
    from wadi.io.outputs import check_out

    out = Path(args.out)
    check_out(out)
    pipeline = student(args)
    save_pipeline(pipeline, out)
    print(f"{out}: {loading_line(pipeline, out)}")
    return 0


def _extract(argv: Sequence[str]) -> int:
    parser = _parser("extract")
    parser.add_argument("teacher", help="pipeline folder or Hub id")
    parser.add_argument("student", help="pipeline folder or Hub id, or a safetensors file of the network alone")
    parser.add_argument("--rank", type=RANK, default=256, help="of the angles")
    parser.add_argument("--out", type=str, required=True, help="adapter folder to write; must not exist")
    parser.add_argument("--target_modules", type=str, default=None, help="regular expression; default: the family's")
    parser.add_argument(
        "--timestep", type=Whole(1, TIMESTEP.high), default=None, help="of the student; default: its scheduler's"
    )
    args = _parse(parser, argv)
    from wadi.convert.extract import describe, extract

    found = extract(args.teacher, args.student, args.rank, Path(args.out), args.target_modules, args.timestep)
    print(f"{describe(found)}\nadapter  {args.out}")
    return 0


def _import_authors(argv: Sequence[str]) -> int:
    parser = _parser("import-authors")
    parser.add_argument("file", help="rotated_unet*.safetensors or rotated_transformer.safetensors, as the authors released it")
    parser.add_argument("--base", type=str, required=True, help="folder or Hub id of the pipeline it belongs in")
    parser.add_argument("--out", type=str, required=True, help="pipeline folder to write; must not exist")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")
    args = _parse(parser, argv)
    from wadi.backbones.saving import loading_line
    from wadi.cli.generate import dtype_of
    from wadi.convert.authors import import_authors

    pipeline = import_authors(Path(args.file), args.base, Path(args.out), dtype_of(args.dtype))
    print(f"{args.out}: {loading_line(pipeline, Path(args.out))}")
    return 0


def _embed(argv: Sequence[str]) -> int:
    from wadi.cli.embed import run

    return run(argv, _parse, _parser)


def _eval(argv: Sequence[str]) -> int:
    from wadi.cli.eval import run

    return run(argv, _parse, _parser)


def _dreambooth(argv: Sequence[str]) -> int:
    from wadi.cli.dreambooth import run

    return run(argv, _parse, _parser)


def _report(argv: Sequence[str]) -> int:
    parser = _parser("report")
    parser.add_argument("run", help="folder of a run")
    args = _parse(parser, argv)
    from wadi.distill.report import write_report

    print(write_report(Path(args.run)))
    return 0


def _zoo(argv: Sequence[str]) -> int:
    from wadi.cli.zoo import run

    return run(argv, _parse, _parser)


def _analyze(argv: Sequence[str]) -> int:
    from wadi.cli.analyze import analyze

    return analyze(argv, _parse, _parser)


def _swap(argv: Sequence[str]) -> int:
    from wadi.cli.analyze import swap

    return swap(argv, _parse, _parser)


def _control(argv: Sequence[str]) -> int:
    from wadi.cli.control import run

    return run(argv, _parse, _parser)


def _invert_relation(argv: Sequence[str]) -> int:
    from wadi.cli.invert_relation import run

    return run(argv, _parse, _parser)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "distill": (
        "train a one-step student of a teacher; the same command continues an interrupted run",
        _distill,
    ),
    "plan": ("what a run would adapt, train and hold in memory, without weights", _plan),
    "embed": ("encode prompts once, into a cache that distill trains from", _embed),
    "generate": ("draw pictures in one step", _generate),
    "export": ("write a one-step pipeline that loads without this package", _export),
    "extract": ("an adapter from two checkpoints, and what changed between them", _extract),
    "import-authors": ("the authors' released weights as a one-step pipeline", _import_authors),
    "analyze": ("what distillation changed in the weights: norms, directions, ranks, angles", _analyze),
    "swap": ("a student with the teacher's norms or directions put back, as a pipeline", _swap),
    "eval": ("measure pictures, or those that a run draws by a protocol; compare results", _eval),
    "control": ("condition images, ControlNets for teacher or student, edge agreement", _control),
    "invert-relation": ("learn a token for a relation from pictures that share it", _invert_relation),
    "dreambooth": ("teach a model one subject from a few pictures; its one-step student draws it too", _dreambooth),
    "report": ("write a run's report.html", _report),
    "zoo": ("the embedded teacher: train, list its captions, ship a student", _zoo),
}


if __name__ == "__main__":
    sys.exit(main())
