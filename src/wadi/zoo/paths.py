"""Where the teacher, student and prompts that come with the package lie; ``'zoo'`` names them wherever a path is asked for."""

from __future__ import annotations

from pathlib import Path

from wadi.errors import WadiError

NAME = "zoo"
WEIGHTS = Path(__file__).parent / "weights"


def embedded(part: str) -> Path:
    """Path of ``part``: 'teacher' (pipeline folder), 'student' (adapter folder), 'classifier' or 'controlnet'.

    Raises:
        WadiError: if this installation lacks it.
    """
    path = WEIGHTS / part
    if not path.exists():
        raise WadiError(
            f"The embedded {part} is not in this installation ({path} is missing). Expected it beside the package: reinstall "
            "wadi-onestep, or make it with `wadi zoo train`."
        )
    return path


def resolve_teacher(name: str) -> str:
    """A teacher's path or Hub id; 'zoo' is the embedded one."""
    return str(embedded("teacher")) if name == NAME else name


def lasting(teacher: str) -> str:
    """The same teacher as a name that holds from any folder: of a folder its absolute path, of all else itself."""
    place, mark, variant = teacher.partition("?variant=")
    return f"{Path(place).resolve()}{mark}{variant}" if place and Path(place).is_dir() and place != NAME else teacher
