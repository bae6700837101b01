"""COCO captions as the prompts of a protocol, chosen by a rule that any language can repeat.

Published lists of "30k COCO prompts" differ, which changes an FID by points. Our rule: order the images by
``sha256("SEED:IMAGE_ID")``, take the first ``count``, sort them by id, and take from each the caption with the smallest
annotation id. ``ids`` reads a list of annotation ids instead (one on each line), in its own order. Every result contains the
digest of the prompts, so a different list cannot go unnoticed.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.io.records import Count, Record, read_json
from wadi.io.regular import exists, read_text

ID = re.compile("[0-9]{1,18}")
IDS_BYTES = 64 * 2**20  # largest list of ids


@dataclass(frozen=True)
class Coco:
    """One split of COCO on disk.

    Attributes:
        images: file of every image that the captions file names, sorted by image id.
        captions: ``(annotation id, image id, caption)``, sorted by annotation id.
    """

    images: dict[int, Path]
    captions: list[tuple[int, int, str]]


class Image(Record):
    """An entry of ``images`` in a captions file."""

    id: Count
    file_name: str


class Annotation(Record):
    """An entry of ``annotations`` in a captions file."""

    id: Count
    image_id: Count
    caption: str


class Captions(Record):
    """The entries of ``captions_SPLIT.json`` that are used."""

    images: list[Image]
    annotations: list[Annotation]


def open_coco(root: str | Path, split: str) -> Coco:
    """Open ``root/annotations/captions_SPLIT.json`` and the images of ``root/SPLIT/``, with ``split`` 'val2014' or 'val2017'.

    Raises:
        WadiError: if a file is missing or damaged; the message names it.
    """
    path, folder = Path(root) / "annotations" / f"captions_{split}.json", Path(root) / split
    if not exists(path):
        raise WadiError(
            f"COCO folder {str(root)!r} lacks annotations/captions_{split}.json. Unpack "
            f"annotations_trainval{split[-4:]}.zip and {split}.zip there."
        )
    content: Captions = read_json(path, Captions, "COCO's captions file", remedy="Unpack it again.")
    names = {image.id: image.file_name for image in content.images}
    for name in names.values():
        if not name or "/" in name or "\\" in name or name in (".", ".."):
            raise WadiError(f"{str(path)!r} names the image file {name!r}, which is not a plain file name. Unpack it again.")
    captions = sorted((a.id, a.image_id, " ".join(a.caption.split())) for a in content.annotations)
    if not folder.is_dir():
        raise WadiError(f"COCO folder {str(root)!r} lacks {split}/ with the images. Unpack {split}.zip there.")
    present = set(os.listdir(folder))
    missing = sorted(name for name in names.values() if name not in present)
    if missing:
        raise WadiError(
            f"COCO folder {str(root)!r} lacks {split}/{missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} of "
            f"{len(names)} images. Unpack {split}.zip again."
        )
    if stray := next((image for _, image, _ in captions if image not in names), None):
        raise WadiError(f"{str(path)!r} has a caption of image {stray}, which it does not list. Unpack COCO's own file.")
    return Coco({image: folder / names[image] for image in sorted(names)}, captions)


def choose(coco: Coco, count: int, seed: int = 0) -> list[tuple[int, str]]:
    """Return ``count`` pairs ``(annotation id, caption)``, chosen by the module's rule.

    Raises:
        WadiError: if fewer images have captions.
    """
    first: dict[int, tuple[int, str]] = {}
    for annotation, image, caption in coco.captions:
        first.setdefault(image, (annotation, caption))
    if len(first) < count:
        raise WadiError(f"This COCO split has {len(first)} images with captions. {count} are needed: is the split complete?")
    order = sorted(first, key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    return [first[image] for image in sorted(order[:count])]


def read_chosen(coco: Coco, ids: str | Path) -> list[tuple[int, str]]:
    """Return the captions whose annotation ids a text file lists, one on each line, in its order.

    Raises:
        WadiError: on a line that is not a number, an unknown id, or an id that is listed twice.
    """
    captions: dict[int, str] = {annotation: caption for annotation, _, caption in coco.captions}
    chosen: dict[int, str] = {}
    for number, line in enumerate(_lines(ids), 1):
        if not line.strip():
            continue
        problem = None
        annotation: Any = int(line) if ID.fullmatch(line.strip()) else None
        if annotation is None:
            problem = "is not an annotation id"
        elif annotation not in captions:
            problem = "is not an annotation id of this split"
        elif annotation in chosen:
            problem = "is listed twice"
        if problem:
            raise WadiError(
                f"{str(ids)!r} line {number}: {line.strip()[:40]!r} {problem}. Write one annotation id on each line."
            )
        chosen[annotation] = captions[annotation]
    if not chosen:
        raise WadiError(f"{str(ids)!r} contains no annotation id. Write one on each line.")
    return list(chosen.items())


def _lines(path: str | Path) -> list[str]:
    return read_text(path, IDS_BYTES, "List of ids").splitlines()
