"""Read settings from YAML and JSON files and dictionaries, write them, merge them, compare them. No torch import."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wadi.distill.config import DistillConfig
from wadi.errors import WadiError, short_repr
from wadi.io.yaml_files import read_yaml

# Settings that do not affect the result; they may change when a run is resumed. (With ``recompute`` the gradient is another
# product, which is rounded differently: the same run, but not bit for bit.) Of batch and accumulate, only their product with
# the number of processes affects the result; the checkpoint stores it.
BOOKKEEPING = frozenset(
    {"out", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_every", "tracker", "device", "batch", "accumulate",
     "shard", "gradient_checkpointing", "recompute"}
)  # fmt: skip
PATHS = ("teacher", "family", "prompts", "out")
SOURCES = frozenset({"teacher", "prompts", "prompts_field"})  # every checkpoint has digests of their contents


def save_config(config: DistillConfig, path: Path) -> None:
    """Write all settings as YAML. The file is written completely or not at all."""
    import yaml

    from wadi.io.files import write_whole

    write_whole(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def load_config(path: Path) -> DistillConfig:
    """Return the settings in a file of `save_config`, or in any YAML or JSON file that has some of them.

    Raises:
        WadiError: if the file cannot be read or is not a mapping, or a setting is unknown, of a wrong type or out of bounds.
    """
    values = read_settings(path)
    warm = values.get("warm_start", {})
    if not warm.get("pairs"):
        warm.pop("weight", None)  # earlier versions accepted a weight without pairs; it had no effect
    try:
        config: DistillConfig = _build(values, DistillConfig)
    except WadiError as error:
        raise WadiError(f"Config {str(path)!r}: {error}") from error
    return config


def read_settings(path: Path, group: str | None = None) -> dict[str, Any]:
    """Return the settings in a YAML or JSON file as nested dictionaries. Bounds are not checked.

    Args:
        group: read a file that has only the settings of this group, such as ``student``; None = a file that names its groups.
    Raises:
        WadiError: if the file cannot be read or is not a mapping, or a setting is unknown or of a wrong type.
    """
    values = read_yaml(path, "Config")
    if not isinstance(values, dict):
        raise WadiError(f"Config {str(path)!r} is a {type(values).__name__}. It must be a mapping of settings to values.")
    try:
        return typed_settings(_renamed(values if group is None else {group: values}))
    except WadiError as error:
        raise WadiError(f"Config {str(path)!r}: {error}") from error


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file that an earlier version wrote under today's names.

    ``student.timestep`` was one number, and the weighting of the gradient was a setting of the student.
    """
    student = values.get("student")
    if not isinstance(student, Mapping):
        return values
    student = dict(student)
    if "timestep" in student:
        timestep = student.pop("timestep")
        student.setdefault("timesteps", [] if timestep is None else [timestep])
    if "weighting" in student:
        weighting = student.pop("weighting")
        values = {"objective": {"sigma2": "vsd"}.get(weighting, weighting), **values}
    return {**values, "student": student}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested dictionaries of lists and scalars, for YAML and JSON."""
    plain: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        plain[entry.name] = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    return plain


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings of a run as one dictionary with dotted names; a setting that is itself a mapping stays whole."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        group = not prefix and dataclasses.is_dataclass(get_type_hints(DistillConfig).get(name))
        flat |= flat_settings(value, f"{name}.") if group else {prefix + name: value}
    return flat


def from_dict(values: Mapping[str, Any], cls: Any = DistillConfig, prefix: str = "") -> Any:
    """Return a config from nested dictionaries. Missing settings have their default.

    Raises:
        WadiError: if a setting is unknown (the message suggests the nearest name), of a wrong type or out of bounds.
    """
    return _build(typed_settings(values, cls, prefix), cls)


def _build(values: Mapping[str, Any], cls: Any) -> Any:
    hints = get_type_hints(cls)
    return cls(**{k: _build(v, hints[k]) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def typed_settings(values: Mapping[str, Any], cls: Any = DistillConfig, prefix: str = "") -> dict[str, Any]:
    """Convert each setting in nested dictionaries to its type. A ``~`` at the start of a path becomes the home folder.

    Raises:
        WadiError: if a setting is unknown (the message suggests the nearest name) or of a wrong type.
    """
    hints = get_type_hints(cls)
    settings = {}
    for key, value in values.items():
        key = str(key)  # a key in YAML may be a number
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            suggestion = f" Did you mean {prefix + near[0]!r}?" if near else ""
            raise WadiError(
                f"Unknown setting {prefix + key[:100]!r}.{suggestion} The settings are: {', '.join(sorted(hints))}."
            )
        settings[key] = _converted(value, hints[key], prefix + key)
        if prefix + key in PATHS and str(settings[key]).startswith("~"):
            settings[key] = os.path.expanduser(settings[key])
    return settings


def _converted(value: Any, hint: Any, name: str) -> Any:
    """Convert a value from YAML to the annotated type. Integers are accepted as floats, lists become tuples."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return typed_settings(value, hint, name + ".")
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value in options:
            return value
    elif get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(inner) == len(value):
            return tuple(_converted(v, h, f"{name}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))
    elif get_origin(hint) is Mapping and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    elif type(None) in options:  # X | None
        return None if value is None else _converted(value, options[0], name)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-4, which has no decimal point, as a string
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    kind = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise WadiError(f"{name} is {short_repr(value)}. It must be {kind}: correct it in the configuration.")


def merge_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries. Where both have a value, that of ``changes`` is used."""
    both = {**base, **changes}
    for name in base.keys() & changes.keys():
        if isinstance(base[name], Mapping) and isinstance(changes[name], Mapping):
            both[name] = merge_settings(base[name], changes[name])
    return both


def changed_settings(old: DistillConfig, new: DistillConfig, sources: bool = True) -> list[str]:
    """Return the settings that differ and affect the result, as lines ``name: old -> new``.

    Two spellings of one path are equal. The length of a run with a constant learning rate may change: the run gets longer.

    Args:
        sources: whether to compare the names of teacher and prompts. Use False where their contents are compared, since a
            folder may have moved.
    """
    before, after = flat_settings(to_dict(old)), flat_settings(to_dict(new))
    free = BOOKKEEPING | ({"steps"} if old.lr_schedule == new.lr_schedule == "constant" else set())
    free |= set() if sources else SOURCES
    return [
        f"{k}: {before[k]!r} -> {after[k]!r}"
        for k in after
        if k not in free and before[k] != after[k] and not (k in PATHS and _is_same_path(before[k], after[k]))
    ]


def _is_same_path(one: str | None, other: str | None) -> bool:
    try:
        return None not in (one, other) and os.path.samefile(str(one), str(other))
    except (OSError, ValueError):  # a path that does not exist, or a Hub id
        return False
