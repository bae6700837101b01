"""The settings of a distillation run on the command line: presets, YAML files and flags. `distill` and `plan` share them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.parser import flag

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from wadi.distill.config import DistillConfig

# Groups of the help. A setting that is in none of them is shown under "other settings".
GROUPS = {
    "teacher, prompts and output": ("teacher", "family", "prompts", "prompts_field", "out", "seed"),
    "length and size": ("steps", "batch", "accumulate", "resolution"),
    "loss": ("objective", "objective_options", "guidance_scale", "t_range"),
    "optimizer": ("optimizer", "lr_schedule", "lr_warmup", "betas", "eps", "weight_decay", "clip", "max_skipped"),
    "memory and speed": ("device", "dtype", "gradient_checkpointing", "recompute", "shard", "compile", "tf32"),
    "preview": ("sample_every", "sample_prompts", "sample_seeds", "teacher_steps", "teacher_guidance_scale"),
    "checkpoints and tracking": ("checkpoint_every", "keep_checkpoints", "keep_every", "tracker"),
}
NESTED = {"student": "student", "fake": "fake model", "warm_start": "warm start"}


def add_settings(parser: ArgumentParser) -> None:
    """Add ``--preset``, ``--config`` and a flag for each setting of a run."""
    from wadi.distill.config import DistillConfig
    from wadi.distill.presets import PRESETS

    parser.add_argument("--preset", default=None, help=f"settings to start from: {', '.join(PRESETS)}")
    parser.add_argument(
        "--config", type=str, help="YAML or JSON file with some of the settings below; later files and all flags override it"
    )
    parser.add_class_arguments(DistillConfig)
    _group_settings(parser)


def _group_settings(parser: ArgumentParser) -> None:
    """Sort the settings into `GROUPS`: jsonargparse puts all that are not nested into one."""
    groups: list[Any] = parser._action_groups  # type: ignore[assignment]
    before = list(groups)
    actions = {action.dest: (group, action) for group in before for action in group._group_actions}
    for title, names in GROUPS.items():
        section = parser.add_argument_group(title)
        for name in names:
            if name in actions:
                group, action = actions[name]
                group._group_actions.remove(action)
                section._group_actions.append(action)
    added = groups[len(before) :]
    nested = []
    for group in before[2:]:  # after those of positional arguments and of the command's own options
        group.description = None
        first = group._group_actions[0] if group._group_actions else None
        if first is not None and first.dest in NESTED:
            group.title = NESTED[first.dest]
            first.help = "YAML or JSON file with settings of this group"
            nested.append(group)
        else:
            group.title = "other settings"
    others = [group for group in before[2:] if group not in nested]
    groups[:] = [*before[:2], *added[:2], *nested, *added[2:], *others]


def apply_files(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Set the parser's defaults from the preset and the settings files that ``words`` name, and return the words to parse.

    Flags override files, in whatever order they are given; a later file overrides an earlier one.

    Raises:
        WadiError: if there is no such preset, or a file cannot be read.
    """
    from wadi.distill.config import DistillConfig
    from wadi.distill.config_files import flat_settings, merge_settings, read_settings, to_dict
    from wadi.distill.presets import preset

    presets = values_of("--preset", words)
    settings = to_dict(preset(presets[-1]) if presets else DistillConfig())
    for file in values_of("--config", words):
        settings = merge_settings(settings, read_settings(Path(os.path.expanduser(file))))
    for group in NESTED:
        for value in values_of(flag(group), words):
            if os.path.lexists(file := os.path.expanduser(value)):
                settings = merge_settings(settings, read_settings(Path(file), group))
                words = without(flag(group), value, words)
    parser.set_defaults(flat_settings(settings))
    return words


def config_from(options: Namespace) -> DistillConfig:
    """Return the settings of a run from the values of a parser with `add_settings`.

    Raises:
        WadiError: if a value is out of bounds.
    """
    from wadi.distill.config import DistillConfig
    from wadi.distill.config_files import from_dict, to_dict

    values = options.as_dict()
    config: DistillConfig = from_dict({name: values[name] for name in to_dict(DistillConfig())})
    return config


def values_of(option: str, words: list[str]) -> list[str]:
    """Return all values given for ``option``, as ``--option value`` or ``--option=value``."""
    values = []
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == option and following is not None:
            values.append(following)
        elif word.startswith(option + "="):
            values.append(word.partition("=")[2])
    return values


def without(option: str, value: str, words: list[str]) -> list[str]:
    """Return the words without ``--option value`` and ``--option=value``."""
    remaining, result = iter(words), list[str]()
    for word in remaining:
        following = next(remaining, None) if word == option else None
        if following == value or word == f"{option}={value}":
            continue
        result += [word] if following is None else [word, following]
    return result
