"""Which prompt belongs to which image of a folder: a list of files and prompts, one JSON object on each line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from wadi.errors import WadiError
from wadi.io.records import Record, read_json_lines

Pairs = Sequence[tuple[str, str]]


class Pair(Record):
    """A line of the list."""

    file: str  # path of the image within its folder, with /
    prompt: str


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Read lines such as ``{"file": "0.png", "prompt": "a red apple"}``, in their order. Other entries of a line are ignored.

    Raises:
        WadiError: if a line is something else, a file is named twice or is outside the folder, or the list is empty.
    """
    remedy = 'Each line is {"file": "0.png", "prompt": "a red apple"}.'
    rows: list[Pair] = read_json_lines(path, Pair, "List of images and prompts", remedy=remedy)
    if not rows:
        raise WadiError(f"List of images and prompts {str(path)!r} is empty. {remedy}")
    pairs: dict[str, str] = {}
    for row in rows:
        inside = PurePosixPath(row.file)
        if inside.is_absolute() or ".." in inside.parts or not row.file:
            raise WadiError(f"{str(path)!r} names the file {row.file!r}. Name files by their path within the image folder.")
        if str(inside) in pairs:
            raise WadiError(f"{str(path)!r} names {row.file!r} twice. An image has one prompt.")
        pairs[str(inside)] = row.prompt
    return list(pairs.items())


def pair_with_prompts(folder: Path, files: Sequence[Path], pairs: Pairs) -> tuple[list[Path], list[str]]:
    """Return the images of a folder in the order of a list, and their prompts.

    Args:
        files: all image files of the folder.
    Raises:
        WadiError: if the list lacks an image of the folder, or the folder one of the list.
    """
    present = {path.relative_to(folder).as_posix(): path for path in files}
    named = dict(pairs)
    for missing, other, where in (
        (named.keys() - present.keys(), "list", "folder"),
        (present.keys() - named.keys(), "folder", "list"),
    ):
        if missing:
            raise WadiError(
                f"{len(missing)} images of the {other} are not in the {where} (first: {min(missing)!r}). List each image of "
                f"{str(folder)!r} with its prompt."
            )
    return [present[name] for name in named], list(named.values())
