"""Combine several adapters of one teacher into one student, each at its own scale.

`wadi.roles.combined` merges them and has the formula. The first adapter must be a student's, and the others must agree with it
in teacher, timesteps and resolution, so that one schedule fits all of them and the order does not matter. An adapter without
timesteps, such as one of `wadi dreambooth`, takes those of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi import roles
from wadi.errors import WadiError
from wadi.extras.lora.apply import check_scale
from wadi.lorad.pairing import stored_pairing
from wadi.zoo.paths import resolve_teacher

# The folder of an adapter, or several with their scales.
Adapters = str | Path | Mapping[Any, float]


@dataclass(frozen=True)
class Part:
    """One adapter of a combination.

    Attributes:
        folder, scale: where it is, and by what its angles or its change of the weights are multiplied.
        about: timesteps, resolution and teacher; None for an adapter that is not a student's.
        config: its ``adapter_config.json``.
    """

    folder: Path
    scale: float
    about: roles.About | None
    config: Mapping[str, Any]

    @property
    def is_lorad(self) -> bool:
        """Whether its scale multiplies angles."""
        return self.config.get("peft_type") == "LORAD"


def read_parts(adapters: Mapping[Path, float]) -> list[Part]:
    """Read the settings of adapter folders, and check that they can be combined. Weights are not read.

    Raises:
        WadiError: if there is none, a folder is no adapter, a scale is out of range, the first is not a student's, or two of
            them differ in timesteps, resolution or pairing.
    """
    parts: list[Part] = []
    for folder, scale in adapters.items():
        check_scale(scale, f"adapter {str(folder)!r}")
        config = roles.read_config(folder)
        about = roles.read_about(folder) if not parts or roles.is_students(folder) else None
        parts.append(Part(folder, float(scale), about, config))
    if not parts:
        raise WadiError("Received an empty collection of adapters. Give at least one, with its scale.")
    for part in parts[1:]:
        _check_alike(parts[0], part)
    _check_pairings(parts)
    return parts


def _check_alike(first: Part, other: Part) -> None:
    one, two = first.about, other.about
    if one is None or two is None:
        return
    for setting in ("timesteps", "resolution"):
        values = [getattr(about, setting) for about in (one, two)]
        if None not in values and tuple(values[0]) != tuple(values[1]):
            raise WadiError(
                f"Adapter {str(first.folder)!r} has the {setting} {list(values[0])}, and {str(other.folder)!r} has "
                f"{list(values[1])}. Only students with the same {setting} can be combined: one schedule must fit all of them."
            )


def _check_pairings(parts: Sequence[Part]) -> None:
    rotating = [(part.folder, stored_pairing(part.config, str(part.folder))) for part in parts if part.is_lorad]
    for folder, pairing in rotating[1:]:
        if pairing != rotating[0][1]:
            raise WadiError(
                f"Adapter {str(rotating[0][0])!r} has the pairing {rotating[0][1]}, and {str(folder)!r} has {pairing}. Only "
                "the angles of adapters with the same pairing add."
            )


def check_same_teacher(parts: Sequence[Part]) -> None:
    """Raise `WadiError` if two students were trained on different teachers.

    The digests of their files decide; the names, where an adapter of an earlier version has no digest.
    """
    students = [(part.folder, part.about) for part in parts if part.about is not None]
    (first, one), *others = students
    for folder, two in others:
        digests = one.teacher_digest, two.teacher_digest
        names = resolve_teacher(one.teacher), resolve_teacher(two.teacher)
        if (digests[0] != digests[1]) if None not in digests else (names[0] != names[1]):
            raise WadiError(
                f"Adapter {str(first)!r} was trained on the teacher {one.teacher!r}, and {str(folder)!r} on {two.teacher!r}"
                + (", whose files differ" if None not in digests else "")
                + ". Combine students of one teacher, or name the teacher to put all of them on (--teacher, teacher=)."
            )
