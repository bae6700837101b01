"""Build the parser of a command and read its command line.

Options are written with dashes (``--teacher-steps``, ``--student.target-modules``); underscores mean the same. In YAML files
and in Python the same settings have underscores.
"""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from wadi.cli.family import load_family
from wadi.cli.guard import LONGEST
from wadi.errors import WadiError

YAML_MODE = "wadi"  # jsonargparse's YAML, with bounds on depth and size


@dataclass(frozen=True)
class Arguments:
    """A command line that was read.

    Attributes:
        options: the value of each option, by its name with underscores.
        words: the words after the command's name, options with dashes.
        changed: names of the options whose value is not the default.
    """

    options: Namespace
    words: list[str]
    changed: frozenset[str]

    @property
    def named(self) -> frozenset[str]:
        """Names of the options on the command line, also of those that were given their default."""
        words = self.words[: _end_of_options(self.words)]
        return frozenset(word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))


@dataclass(frozen=True)
class Command:
    """The parts of a command.

    Attributes:
        summary: one line for the help.
        add_options: adds the command's options to a parser.
        run: does the work and returns the exit code.
        prepare: reads settings files that the words name, sets the parser's defaults by them, and returns the words to parse.
    """

    summary: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Arguments], int]
    prepare: Callable[[ArgumentParser, list[str]], list[str]] | None = None

    def start(self, name: str, argv: Sequence[str]) -> int:
        """Read the command line ``argv``, load the family that it names, and run the command."""
        arguments = self.read(name, argv)
        load_family(arguments)
        return self.run(arguments)

    def read(self, name: str, argv: Sequence[str]) -> Arguments:
        """Read the command line ``argv``.

        Raises:
            WadiError: with the option and its value, if one is unknown, missing or cannot be read.
        """
        parser = self.parser(name)
        words = with_dashes(argv)
        to_parse = words if self.prepare is None else self.prepare(parser, words)
        options = parse(parser, to_parse)
        defaults = {action.dest: action.default for action in parser._actions}
        changed = frozenset(key for key, value in vars(options).items() if value != defaults.get(key))
        return Arguments(options, words, changed)

    def parser(self, name: str) -> ArgumentParser:
        """Return the parser of the command with all its options."""
        set_loader(YAML_MODE, _bounded_yaml, (yaml.YAMLError,))
        parser = ArgumentParser(
            prog=f"wadi {name}",
            description=self.summary,
            exit_on_error=False,
            parser_mode=YAML_MODE,
            formatter_class=HelpFormatter,
        )
        self.add_options(parser)
        _use_dashes(parser)
        parser.usage = " ".join(["%(prog)s [options]", *_required(parser)])
        return parser


class HelpFormatter(DefaultHelpFormatter):
    """Show the default of an option unless its help does."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        default = action.default
        if "default" in text or default is None or default is False or default in (SUPPRESS, "", (), []):
            return text
        return f"{text} (default: %(default)s)"


def flag(name: str) -> str:
    """Return an option as it is written on the command line: ``--lora-scale`` for ``lora_scale``."""
    return "--" + name.replace("_", "-")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Return the words with dashes for underscores in the names of options; values and words after ``--`` are unchanged."""
    end = _end_of_options(argv)
    return [_with_dashes(word) if word.startswith("--") else word for word in argv[:end]] + list(argv[end:])


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _end_of_options(words: Sequence[str]) -> int:
    return list(words).index("--") if "--" in words else len(words)


def _required(parser: ArgumentParser) -> list[str]:
    """Return required options and positional arguments, as the usage line shows them."""
    options = [
        f"{action.option_strings[0]} {action.dest.upper()}"
        for action in parser._actions
        if action.required and action.option_strings
    ]
    positionals = parser._get_positional_actions()
    optional = {"?": "[{}]", "*": "[{} ...]"}
    return options + [optional.get(str(action.nargs), "{}").format(action.dest) for action in positionals]


def _use_dashes(parser: ArgumentParser) -> None:
    """Rename the options that came from dataclasses, which have underscores."""
    for action in parser._actions:
        for index, option in enumerate(action.option_strings):
            renamed = option.replace("_", "-")
            if renamed != option and option in parser._option_string_actions:
                action.option_strings[index] = renamed  # type: ignore[index]
                parser._option_string_actions[renamed] = parser._option_string_actions.pop(option)


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse ``words``; ``~`` at the start of a value, as in ``--out=~/runs``, becomes the home folder.

    Raises:
        WadiError: with the option and its value.
    """
    try:
        return parser.parse_args([_expand_home(word) for word in words])
    except ArgumentError as error:
        reason = plain_reason(str(getattr(error, "message", None) or error))
        reason = reason if len(reason) <= LONGEST else f"{reason[: LONGEST // 2]} ... {reason[-LONGEST // 2 :]}"
        raise WadiError(f"{reason.rstrip('.')}. See `{parser.prog} --help`.") from error
    except (ValueError, RecursionError) as error:  # from the YAML reader of jsonargparse
        if isinstance(error, WadiError):
            raise
        reason = " ".join(str(error).split())[:LONGEST]
        raise WadiError(f"An option cannot be read: {reason}. See `{parser.prog} --help`.") from error


def plain_reason(message: str) -> str:
    """Return a message of jsonargparse in one line, with options as they are written and types by their names."""
    message = " ".join(message.split())
    message = re.sub(r'Parser key "([\w.]+)":', lambda key: f"{flag(key[1])}:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("NoneType", "null").replace("typing.", "")
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)"
    return re.sub(union, lambda types: f"Expected {types[1].replace(', null', ' or null')}. Got value: {types[2]}", message)


def _expand_home(word: str) -> str:
    """Return ``--out=~/runs`` with the home folder: shells do not replace ``~`` after ``=``."""
    return re.sub(r"^(--\w[\w.-]*=)(~(?:/.*)?)$", lambda parts: parts[1] + os.path.expanduser(parts[2]), word)


def _bounded_yaml(text: str) -> Any:
    """Return the value of an option as jsonargparse reads YAML.

    Raises:
        WadiError: if it is nested too deeply, or its aliases expand without bound.
    """
    from wadi.io.yaml_files import check_yaml_size

    check_yaml_size(text, "Its value")
    return get_loader("yaml")(text)
