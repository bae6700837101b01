"""Options of all commands: dashes and underscores, help, and what the parser does not change."""

import dataclasses
import importlib
import json
import re

import pytest

from wadi.cli.main import COMMANDS, columns, main, overview
from wadi.cli.parser import Command, plain_reason, with_dashes
from wadi.distill.config import DistillConfig


def all_commands():
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"wadi.cli.{name.replace('-', '_')}")
        if hasattr(module, "SUBCOMMANDS"):
            yield from ((f"{name} {sub}", command) for sub, command in module.SUBCOMMANDS.items())
        else:
            prepare = getattr(module, "prepare", None)
            yield name, Command(summary, module.add_options, module.run, prepare)


CASES = dict(all_commands())


def options_of(name):
    """Return the options of a command, each with its action; without those that end the program."""
    actions = CASES[name].parser(name)._actions
    options = {option: action for action in actions for option in action.option_strings if option.startswith("--")}
    return {option: action for option, action in options.items() if action.dest not in ("help", "print_shtab")}


def words_for(name, spell):
    """Return a command line with every option that takes a plain value, spelled by ``spell``, and the needed positionals."""
    words = ["x"] * len([a for a in CASES[name].parser(name)._get_positional_actions() if a.nargs is None])
    for option, action in options_of(name).items():
        value = value_for(action)
        if value is not None:
            words += [spell(option), *value]
    return words


def value_for(action):
    """Return a valid value of an option as words; None for options that name a file of settings."""
    if action.dest in ("student", "fake", "warm_start", "preset", "config"):
        return None if action.dest != "student" or "CONFIG" in str(action.metavar) else ["x"]
    if action.nargs == 0:
        return []
    if isinstance(action.default, (tuple, list)):
        values = list(action.default) or ([700] if action.dest == "student.timesteps" else ["x"])
        return [json.dumps(values)] if action.nargs is None else [str(value) for value in values]
    if isinstance(action.default, bool):
        return [str(action.default).lower()]
    if action.default not in (None, ""):
        return [str(action.default)]
    if action.dest == "fake.weighting":
        return ["none"]
    if action.dest == "resolution" and action.nargs is None:
        return ["[64, 64]"]
    return ["1"] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize("name", CASES)
def test_dashes_and_underscores_mean_the_same(name):
    dashed = CASES[name].read(name, words_for(name, lambda option: option))
    underscored = CASES[name].read(name, words_for(name, lambda option: "--" + option[2:].replace("-", "_")))
    assert dashed.options == underscored.options
    assert dashed.words == underscored.words
    assert dashed.changed == underscored.changed


@pytest.mark.parametrize("name", CASES)
def test_help_shows_every_option_with_dashes(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([*name.split(), "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert not re.search(r"(?m)^  --[\w.-]*_", text)
    for option in options_of(name):
        assert f"  {option}" in text
    assert max(map(len, text.splitlines())) <= 128


@pytest.mark.parametrize("name", CASES)
def test_every_option_has_a_help_text(name):
    without = [option for option, action in options_of(name).items() if not action.help]
    assert without == []


@pytest.mark.parametrize("name", ["distill", "plan"])
def test_every_setting_of_a_run_is_in_a_named_group(name):
    parser = CASES[name].parser(name)
    groups = {a.dest: group.title for group in parser._action_groups for a in group._group_actions}
    config = DistillConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert groups[field.name] != "other settings", f"put {field.name} into a group of wadi.cli.settings.GROUPS"
        for nested in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            assert groups[f"{field.name}.{nested.name}"] == groups[field.name]


def test_the_overview_is_in_two_columns():
    lines = [line for line in overview().splitlines() if line.startswith("  ")]
    assert len(lines) == len(COMMANDS)
    assert len({line.index(COMMANDS[line.split()[0]]) for line in lines}) == 1
    assert columns({"a": "x", "long": "y"}) == "  a     x\n  long  y"


@pytest.mark.parametrize("name", ["control", "zoo"])
def test_a_command_with_subcommands_lists_them(name, capsys):
    assert main([name]) == 2
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(sub in text for sub in CASES if sub.startswith(name + " "))
    assert main([name, "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_values_and_words_after_two_dashes_keep_their_underscores():
    assert with_dashes(["--a_b.c_d=e_f", "g_h", "--i_j", "k_l", "-m_n", "--", "--o_p"]) == [
        "--a-b.c-d=e_f", "g_h", "--i-j", "k_l", "-m_n", "--", "--o_p",
    ]  # fmt: skip


def test_named_options_include_those_that_were_given_their_default():
    arguments = CASES["generate"].read("generate", ["--batch", "8", "--lora_scale=1", "--count", "2", "--", "--seed"])
    assert arguments.named == {"batch", "lora_scale", "count"}
    assert arguments.changed == {"prompt", "lora_scale", "count"}
    assert arguments.options.prompt == "--seed"


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ("Parser key \"a_b.c\": Expected a <class 'int'>. Got value: x", "--a-b.c: Expected a int. Got value: x"),
        (
            "Parser key \"t\":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class 'int'>, <class "
            "'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n  Given value type: <class 'str'>\n  Given value: q",
            "--t: Expected int or null. Got value: q",
        ),
    ],
)
def test_messages_of_the_parser_are_made_plain(message, plain):
    assert plain_reason(message) == plain
