"""Paths of the teacher, student and other models that come with the package. The name ``'zoo'`` stands for them in any path."""

from __future__ import annotations

from pathlib import Path

from wadi.errors import WadiError

NAME = "zoo"
WEIGHTS = Path(__file__).parent / "weights"


def embedded_path(part: str) -> Path:
    """Return the path of ``part``: 'teacher' (pipeline folder), 'student' (adapter folder), 'classifier' or 'controlnet'.

    Raises:
        WadiError: if this installation does not include it.
    """
    path = WEIGHTS / part
    if not path.exists():
        raise WadiError(
            f"The embedded {part} is missing from this installation ({path} does not exist). Reinstall wadi-onestep, or train "
            "it with `wadi zoo train`."
        )
    return path


def resolve_teacher(name: str) -> str:
    """Return the path or Hub id of a teacher; 'zoo' is the embedded one."""
    return str(embedded_path("teacher")) if name == NAME else name


def absolute_source(teacher: str) -> str:
    """Return the absolute path if ``teacher`` is a folder, which is valid in any working directory; otherwise ``teacher``."""
    place, mark, variant = teacher.partition("?variant=")
    return f"{Path(place).resolve()}{mark}{variant}" if place and Path(place).is_dir() and place != NAME else teacher
