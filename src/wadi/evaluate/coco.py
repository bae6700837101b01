"""COCO captions as a protocol's prompts, chosen by a rule that any language can repeat.

Published lists of "30k COCO prompts" differ, and move an FID by points. Ours: images in the order of
``sha256("SEED:IMAGE_ID")``, the first ``count`` of them, sorted by id; of each the caption with the smallest annotation id.
``ids`` takes a list of annotation ids instead (one a line), in that list's own order. The digest of the prompts is in every
result, so that lists of another origin do not go unseen.
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
IDS_BYTES = 64 * 2**20  # of a list of ids


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
    """``captions_SPLIT.json``, as far as it is used."""

    images: list[Image]
    annotations: list[Annotation]


def open_coco(root: str | Path, split: str) -> Coco:
    """``root/annotations/captions_SPLIT.json`` and the images of ``root/SPLIT/``, ``split`` being 'val2014' or 'val2017'.

    Raises:
        WadiError: naming the file that is missing or damaged.
    """
    path, folder = Path(root) / "annotations" / f"captions_{split}.json", Path(root) / split
    if not exists(path):
        raise WadiError(
            f"COCO folder {str(root)!r} lacks annotations/captions_{split}.json. Expected it and {split}/: unpack "
            f"annotations_trainval{split[-4:]}.zip and {split}.zip there."
        )
    content: Captions = read_json(path, Captions, "COCO's captions file", remedy="Unpack it anew.")
    names = {image.id: image.file_name for image in content.images}
    for name in names.values():
        if not name or "/" in name or "\\" in name or name in (".", ".."):
            raise WadiError(f"{str(path)!r} names the image file {name!r}. Expected a name without a folder: unpack it anew.")
    captions = sorted((a.id, a.image_id, " ".join(a.caption.split())) for a in content.annotations)
    if not folder.is_dir():
        raise WadiError(f"COCO folder {str(root)!r} lacks {split}/. Expected the images there: unpack {split}.zip.")
    there = set(os.listdir(folder))
    lost = sorted(name for name in names.values() if name not in there)
    if lost:
        raise WadiError(
            f"COCO folder {str(root)!r} lacks {split}/{lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''} of "
            f"{len(names)} images. Expected all of them: unpack {split}.zip anew."
        )
    if stray := next((image for _, image, _ in captions if image not in names), None):
        raise WadiError(f"{str(path)!r} has a caption of image {stray}, which it does not list. Expected COCO's own file.")
    return Coco({image: folder / names[image] for image in sorted(names)}, captions)


def choose(coco: Coco, count: int, seed: int = 0) -> list[tuple[int, str]]:
    """``count`` pairs ``(annotation id, caption)`` by the module's rule.

    Raises:
        WadiError: if fewer images have captions.
    """
    first: dict[int, tuple[int, str]] = {}
    for annotation, image, caption in coco.captions:
        first.setdefault(image, (annotation, caption))
    if len(first) < count:
        raise WadiError(f"This COCO split has {len(first)} images with captions. Expected at least {count}: is it complete?")
    order = sorted(first, key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    return [first[image] for image in sorted(order[:count])]


def listed(coco: Coco, ids: str | Path) -> list[tuple[int, str]]:
    """The captions whose annotation ids a text file lists, one a line, in its order.

    Raises:
        WadiError: on a line that is no number, an unknown id or one that stands there twice.
    """
    captions: dict[int, str] = {annotation: caption for annotation, _, caption in coco.captions}
    found: dict[int, str] = {}
    for number, line in enumerate(_lines(ids), 1):
        if not line.strip():
            continue
        problem = None
        annotation: Any = int(line) if ID.fullmatch(line.strip()) else None
        if annotation is None:
            problem = "is no annotation id"
        elif annotation not in captions:
            problem = "is no annotation id of this split"
        elif annotation in found:
            problem = "stands there twice"
        if problem:
            raise WadiError(
                f"{str(ids)!r} line {number}: {line.strip()[:40]!r} {problem}. Expected one id of a caption a line."
            )
        found[annotation] = captions[annotation]
    if not found:
        raise WadiError(f"{str(ids)!r} lists no annotation id. Expected one a line.")
    return list(found.items())


def _lines(path: str | Path) -> list[str]:
    return read_text(path, IDS_BYTES, "List of ids").splitlines()
