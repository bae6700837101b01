"""Exemplars of a relation: pictures that all show it, and coarse descriptions that say between what.

A folder holds pictures and ``descriptions.jsonl``, one object a line: ``{"file": "00.png", "text": "fox <R> pizza"}``, where
``text`` is a sentence or a list of sentences with the token in it. ReVersion's own ``text.json``
(``{"0.jpg": ["cat {} stone", ...]}``) is read as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.images import SUFFIXES, read_image
from wadi.io.records import Record, read_json, read_json_lines

DESCRIPTIONS, TEMPLATES = "descriptions.jsonl", "text.json"
REMEDY = f"Expected a JSON object with 'file' and 'text' on each line of {DESCRIPTIONS}, or one of file names in {TEMPLATES}."


@dataclass(frozen=True)
class Exemplars:
    """``pictures`` ``(N, 3, height, width)`` in [0, 1]; ``sentences[i]`` describe picture ``i``, each with the token in it."""

    pictures: Tensor
    sentences: list[list[str]]

    def __len__(self) -> int:
        return len(self.sentences)


def read_exemplars(folder: Path, token: str, resolution: tuple[int, int]) -> Exemplars:
    """The exemplars of ``folder``, cropped about their centre to ``resolution`` ``(height, width)``, in the order of names.

    Raises:
        WadiError: if there are fewer than two pictures, one of them cannot be read or has no description, or a description
            lacks ``token`` or names no picture.
    """
    described = check_exemplars(folder, token)
    pictures = torch.stack([read_picture(folder / name, resolution) for name in described])
    return Exemplars(pictures, list(described.values()))


def check_exemplars(folder: Path, token: str) -> dict[str, list[str]]:
    """Return the sentences of each image in the order of names, without reading the images.

    Raises:
        WadiError: as `read_exemplars`, but for images that cannot be read.
    """
    if not folder.is_dir():
        raise WadiError(f"Exemplars {str(folder)!r} do not exist. Expected a folder of pictures and {DESCRIPTIONS}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < 2:
        found = f"a single picture, {paths[0].name}" if paths else "no picture"
        raise WadiError(
            f"Exemplar folder {str(folder)!r} holds {found}. Expected at least 2, better ten ({', '.join(sorted(SUFFIXES))}): "
            "only what several share can be told from what one shows."
        )
    described = _described(folder, token)
    names = [path.name for path in paths]
    if bare := [name for name in names if name not in described]:
        raise WadiError(
            f"{str(folder)!r} holds no description of {_some(bare)}. Expected one for every picture in {DESCRIPTIONS}."
        )
    if lost := sorted(described.keys() - set(names)):
        raise WadiError(
            f"Descriptions in {str(folder)!r} name {_some(lost)}, which are not there. Expected pictures by these names."
        )
    return {name: described[name] for name in names}


def _described(folder: Path, token: str) -> dict[str, list[str]]:
    """Sentences by file name, each with ``token`` in it."""
    if (folder / DESCRIPTIONS).is_file():
        described = {}
        for name, said in _lines(folder / DESCRIPTIONS):
            if name in described:
                raise WadiError(
                    f"{str(folder / DESCRIPTIONS)!r} has two lines for {name}. Give one, with a list of sentences as its text."
                )
            described[name] = said
    elif (folder / TEMPLATES).is_file():
        read: dict[str, Any] = read_json(folder / TEMPLATES, dict[str, Any], "Descriptions", remedy=REMEDY)
        described = {name: _sentences(said, f"{TEMPLATES}, {name}") for name, said in read.items()}
        described = {name: [sentence.replace("{}", token) for sentence in said] for name, said in described.items()}
    else:
        raise WadiError(
            f"Exemplar folder {str(folder)!r} has no {DESCRIPTIONS}. Expected one line for each picture, such as "
            f'{{"file": "00.png", "text": "fox {token} pizza"}}.'
        )
    for name, sentences in described.items():
        for sentence in sentences:
            if token not in sentence:
                raise WadiError(
                    f"The description of {name} is {sentence!r}, without {token}. Expected the token between what it relates, "
                    f"such as 'fox {token} pizza'."
                )
    return described


class Description(Record):
    """A line of ``descriptions.jsonl``."""

    file: str
    text: str | list[str]


def _lines(path: Path) -> Iterable[tuple[str, list[str]]]:
    rows: list[Description] = read_json_lines(path, Description, "Descriptions", remedy=REMEDY)
    for number, row in enumerate(rows, 1):
        yield row.file, _sentences(row.text, f"{path}, entry {number}")


def _sentences(said: Any, where: str) -> list[str]:
    sentences = [said] if isinstance(said, str) else said
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
        raise WadiError(f"The description in {where} is {str(said)[:80]!r}. Expected a sentence or a list of sentences.")
    return [sentence.strip() for sentence in sentences]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_picture(path: Path, resolution: tuple[int, int]) -> Tensor:
    """A picture ``(3, height, width)`` in [0, 1], cropped about its centre; see `wadi.io.images`.

    Raises:
        WadiError: if the file is no picture.
    """
    height, width = resolution
    fitted = ImageOps.fit(read_image(path, "Exemplar"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255
