"""Expand a study into cells (settings without a seed) and check the settings of each."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from wadi.distill.config import DistillConfig
from wadi.distill.config_files import flat_settings, from_dict, merge_settings, to_dict
from wadi.distill.presets import preset
from wadi.errors import WadiError, short_repr
from wadi.study.file import Study

TAKEN = {"seed": "list it under seeds", "out": "give it as --out"}  # settings that a study sets itself
LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class Cell:
    """One combination of settings, trained with every seed.

    Attributes:
        name: also the start of its folders' names.
        varied: the settings in which the cells differ, by dotted name.
        config: all settings; ``seed`` and ``out`` have their defaults.
    """

    name: str
    varied: dict[str, Any]
    config: DistillConfig


def expand(study: Study) -> list[Cell]:
    """Return the cells of a study in the order of the file; the last setting of the grid varies fastest.

    Raises:
        WadiError: if a setting is unknown, of a wrong type or out of bounds (the message names the cell), the study sets it
            itself, two cells have the same settings, or the baseline is none of the cells.
    """
    points = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    short = _short_names(list(study.grid))
    cells: dict[str, Cell] = {}
    for own_name, own in (study.cells or {"": {}}).items():
        for point in points:
            if both := sorted(_flat(own).keys() & _flat(point).keys()):
                raise WadiError(f"cells.{own_name} sets {both[0]!r}, which grid sets as well. Set it in one of them.")
            words = [str(own_name)] if own_name else []
            words += [f"{short[name]}={_text(value)}" for name, value in point.items()]
            cell = _cell(study, _safe(",".join(words)), {**_flat(own), **_flat(point)})
            if cell.name in cells:
                raise WadiError(f"Two cells have the name {cell.name!r}. List each value of the grid once.")
            cells[cell.name] = cell
    _check_different(list(cells.values()))
    if study.baseline is not None and study.baseline not in cells:
        raise WadiError(f"baseline is {study.baseline!r}, which is no cell. The cells are {', '.join(cells)}.")
    return list(cells.values())


def with_length(config: DistillConfig, steps: int) -> DistillConfig:
    """Return the settings with another number of steps. The phases of the warm start keep their shares of the run."""
    share, warm = steps / config.steps, config.warm_start
    phases = {name: round(getattr(warm, name) * share) for name in ("steps", "fake_steps")}
    return replace(config, steps=steps, warm_start=replace(warm, **phases))


def with_value(cell: Cell, setting: str, value: Any) -> Cell:
    """Return the cell with another value of one setting, by its dotted name.

    Raises:
        WadiError: if the value is of a wrong type or out of bounds.
    """
    config = from_dict(merge_settings(to_dict(cell.config), _nested({setting: value})))
    return Cell(cell.name, {**cell.varied, setting: value}, config)


def value_of(config: DistillConfig, setting: str) -> Any:
    """Return the value of a setting by its dotted name; None if there is no such setting."""
    return flat_settings(to_dict(config)).get(setting)


def _cell(study: Study, name: str, own: dict[str, Any]) -> Cell:
    try:
        cell = Cell(name, own, _config(study, own))
        _check_tuned(study, cell)
        return cell
    except WadiError as error:
        raise WadiError(f"Cell {name!r}: {error}") from error


def _config(study: Study, own: Mapping[str, Any]) -> DistillConfig:
    from wadi.distill.objectives import make_objective
    from wadi.roles.methods import adapter_config

    settings = {**_flat(study.base), **own}
    for name, remedy in TAKEN.items():
        if name in settings:
            raise WadiError(f"The study itself sets {name!r} (received {short_repr(settings[name])}): {remedy}.")
    for name in ("steps", "warm_start.steps", "warm_start.fake_steps"):
        if name in own and study.budget != type(study.budget)():
            raise WadiError(f"{name} is varied, but budget gives all runs one length. Leave out one of them.")
    start = settings.pop("preset", None)
    if start is not None and not isinstance(start, str):
        raise WadiError(f"preset is {short_repr(start)}. It must be the name of a preset.")
    config: DistillConfig = from_dict(merge_settings(to_dict(preset(start) if start else DistillConfig()), _nested(settings)))
    for name in ("teacher", "prompts"):
        if not getattr(config, name):
            raise WadiError(f"{name} is missing. Set it under base, or give a preset that has it.")
    make_objective(config)
    for role in ("student", "fake"):
        of_role = getattr(config, role)
        adapter_config(of_role.adapter, role, of_role.rank, of_role.adapter_options, "x")
    return with_length(config, study.budget.steps) if study.budget.steps is not None else config


def _check_tuned(study: Study, cell: Cell) -> None:
    """Raise `WadiError` unless each value that tuning will try is possible."""
    tune = study.tune
    if tune.factors and not isinstance(start := value_of(cell.config, tune.setting), float):
        raise WadiError(
            f"tune.setting is {tune.setting!r}, whose value is {start!r}. It must be a setting with a decimal number."
        )
    for factor in tune.factors:
        with_value(cell, tune.setting, factor * start)


def _check_different(cells: list[Cell]) -> None:
    for one, other in itertools.combinations(cells, 2):
        if one.config == other.config:
            raise WadiError(f"Cells {one.name!r} and {other.name!r} have the same settings. Leave out one of them.")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name; both ``student.rank: 8`` and ``student: {rank: 8}`` are accepted."""
    groups = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    return {**{name: value for name, value in settings.items() if name not in groups}, **flat_settings(groups)}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        nested = merge_settings(nested, {group: {key: value}} if group else {key: value})
    return nested


def _short_names(names: list[str]) -> dict[str, str]:
    """Return the last word of each dotted name, or the whole name if two end alike."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: word if last.count(word) == 1 else name for name, word in zip(names, last, strict=True)}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _safe(name: str) -> str:
    """Return a name that every file system accepts; a digest tells changed names apart."""
    safe = re.sub(r"[^\w.,=+-]+", "_", name).strip("_.")[:LONGEST]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
