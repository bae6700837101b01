"""Read the exemplars of a relation: images that all show it, and coarse descriptions of the things in them.

A folder contains images and ``descriptions.jsonl`` with one object per line: ``{"file": "00.png", "text": "fox <R> pizza"}``.
``text`` is a sentence or a list of sentences that contain the token. ReVersion's own ``text.json``
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
REMEDY = f"Each line of {DESCRIPTIONS} is a JSON object with 'file' and 'text'; {TEMPLATES} is one object of file names."


@dataclass(frozen=True)
class Exemplars:
    """The exemplars of a relation.

    Attributes:
        images: ``(N, 3, height, width)`` in [0, 1].
        sentences: descriptions of each image; every one contains the token.
    """

    images: Tensor
    sentences: list[list[str]]

    def __len__(self) -> int:
        return len(self.sentences)


def read_exemplars(folder: Path, token: str, resolution: tuple[int, int]) -> Exemplars:
    """Read the exemplars of ``folder``, in the order of their names.

    Args:
        resolution: ``(height, width)``; images are scaled and cropped about their centre.
    Raises:
        WadiError: if there are fewer than two images, an image cannot be read or has no description, or a description does
            not contain ``token`` or names a missing image.
    """
    sentences = check_exemplars(folder, token)
    images = torch.stack([read_exemplar_image(folder / name, resolution) for name in sentences])
    return Exemplars(images, list(sentences.values()))


def check_exemplars(folder: Path, token: str) -> dict[str, list[str]]:
    """Return the sentences of each image, in the order of names. The images are not read.

    Raises:
        WadiError: as `read_exemplars`, except for images that cannot be read.
    """
    if not folder.is_dir():
        raise WadiError(f"The folder of exemplars {str(folder)!r} does not exist. Give a folder of images and {DESCRIPTIONS}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < 2:
        content = f"only one image, {paths[0].name}" if paths else "no image"
        raise WadiError(
            f"The folder of exemplars {str(folder)!r} contains {content}. Put at least 2 there, better ten "
            f"({', '.join(sorted(SUFFIXES))}): the token learns what they have in common."
        )
    sentences = _read_descriptions(folder, token)
    names = [path.name for path in paths]
    if undescribed := [name for name in names if name not in sentences]:
        raise WadiError(
            f"{str(folder)!r} has no description of {_first_names(undescribed)}. Describe every image in {DESCRIPTIONS}."
        )
    if missing := sorted(sentences.keys() - set(names)):
        raise WadiError(
            f"The descriptions in {str(folder)!r} name {_first_names(missing)}, but there is no such image. Add the images, "
            "or remove their lines."
        )
    return {name: sentences[name] for name in names}


def _read_descriptions(folder: Path, token: str) -> dict[str, list[str]]:
    """Return the sentences by file name, after checking that each contains ``token``."""
    if (folder / DESCRIPTIONS).is_file():
        described = {}
        for name, sentences in _read_lines(folder / DESCRIPTIONS):
            if name in described:
                raise WadiError(
                    f"{str(folder / DESCRIPTIONS)!r} has two lines for {name}. Give one, with a list of sentences as its text."
                )
            described[name] = sentences
    elif (folder / TEMPLATES).is_file():
        templates: dict[str, Any] = read_json(folder / TEMPLATES, dict[str, Any], "Descriptions", remedy=REMEDY)
        described = {name: _to_sentences(text, f"{TEMPLATES}, {name}") for name, text in templates.items()}
        described = {name: [sentence.replace("{}", token) for sentence in sentences] for name, sentences in described.items()}
    else:
        raise WadiError(
            f"The folder of exemplars {str(folder)!r} has no {DESCRIPTIONS}. Write one line for each image, such as "
            f'{{"file": "00.png", "text": "fox {token} pizza"}}.'
        )
    for name, sentences in described.items():
        for sentence in sentences:
            if token not in sentence:
                raise WadiError(
                    f"The description of {name} is {sentence!r}, without {token}. Put the token between the two things, such "
                    f"as 'fox {token} pizza'."
                )
    return described


class Description(Record):
    """A line of ``descriptions.jsonl``."""

    file: str
    text: str | list[str]


def _read_lines(path: Path) -> Iterable[tuple[str, list[str]]]:
    rows: list[Description] = read_json_lines(path, Description, "Descriptions", remedy=REMEDY)
    for number, row in enumerate(rows, 1):
        yield row.file, _to_sentences(row.text, f"{path}, entry {number}")


def _to_sentences(text: Any, where: str) -> list[str]:
    sentences = [text] if isinstance(text, str) else text
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
        raise WadiError(f"The description in {where} is {str(text)[:80]!r}. Write a sentence or a list of sentences.")
    return [sentence.strip() for sentence in sentences]


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_exemplar_image(path: Path, resolution: tuple[int, int]) -> Tensor:
    """Return an image ``(3, height, width)`` in [0, 1], scaled and cropped about its centre to ``resolution``.

    Raises:
        WadiError: if the file is not an image that can be read.
    """
    height, width = resolution
    image = ImageOps.fit(read_image(path, "Exemplar"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
