"""Pictures of a protocol, drawn into a folder: resumable, and shared among processes without a change of any picture.

Picture ``i`` is ``000123.png``: prompt ``i`` from the noise of seed ``i``, drawn on the CPU for it alone, so neither batch nor
process enters. Each file is written whole or not at all, and one that is there is done: the same command draws what is missing.
Beside them ``pictures.json`` tells what they are of, and ``prompts.jsonl`` the prompt and seed of each.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wadi.distill.config import flatten
from wadi.errors import WadiError
from wadi.evaluate.generators import LIBRARIES, Generator
from wadi.io.files import write_whole
from wadi.io.progress import progress
from wadi.io.records import Record, as_json, convert, read_json
from wadi.io.regular import exists
from wadi.io.versions import installed_versions
from wadi.parallel.ranks import Ranks
from wadi.pipelines.generate import Sampling, generate_images

ABOUT, PROMPTS = "pictures.json", "prompts.jsonl"


class About(Record):
    """``pictures.json``: what decided about the images."""

    generator: dict[str, Any]
    prompts: dict[str, Any]
    seeds: str


def file_name(index: int) -> str:
    """Of picture ``index``; names sort as the pictures do."""
    return f"{index:06d}.png"


def prompts_digest(prompts: Sequence[str]) -> str:
    """Hex digest of texts in their order, each with its length before it."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = prompt.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def seeds_digest(seeds: Sequence[int]) -> str:
    """Hex digest of seeds in their order."""
    return hashlib.sha256(",".join(map(str, seeds)).encode()).hexdigest()


def draw_missing(
    generator: Generator, prompts: Sequence[str], seeds: Sequence[int], folder: Path, batch: int = 8, ranks: Ranks | None = None
) -> int:
    """Draw those pictures that ``folder`` lacks; with several processes each draws its own and all wait for the last.

    Returns:
        How many this process drew.
    Raises:
        WadiError: if the folder holds pictures of something else (which setting differs), or cannot be written.
    """
    ranks = ranks or Ranks()
    about = {
        "generator": generator.about,
        "prompts": {"count": len(prompts), "sha256": prompts_digest(prompts)},
        "seeds": seeds_digest(seeds),
        "libraries": installed_versions(LIBRARIES),
    }
    ranks.on_first(lambda: _claim(folder, about, prompts, seeds))
    missing = [i for i in range(ranks.index, len(prompts), ranks.count) if not (folder / file_name(i)).exists()]
    if missing:
        pipeline = generator.open()
        with progress(f"drawing {generator.name}", len(missing), quiet=ranks.index > 0) as bar:
            for first in range(0, len(missing), batch):
                rows = missing[first : first + batch]
                drawn = generate_images(
                    pipeline, [prompts[i] for i in rows], [seeds[i] for i in rows],
                    Sampling(generator.steps, generator.guidance_scale, batch=len(rows)),
                )  # fmt: skip
                for i, picture in zip(rows, drawn.images, strict=True):
                    write_whole(folder / file_name(i), _png(picture))
                bar.advance(by=len(rows))
    ranks.wait_for_all()
    return len(missing)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG", compress_level=3)  # a third larger and several times faster than the smallest
    return stream.getvalue()


def _claim(folder: Path, about: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write what the folder is to hold, or check that it is the same."""
    there = read_about(folder)
    if there is None:
        lines = (json.dumps({"file": file_name(i), "prompt": p, "seed": seeds[i]}) for i, p in enumerate(prompts))
        write_whole(folder / PROMPTS, ("\n".join(lines) + "\n").encode())
        write_whole(folder / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    elif told := differences(there, as_json(about)):
        raise WadiError(
            f"Folder {str(folder)!r} holds pictures of something else: {'; '.join(told)}. Expected a new folder, or the "
            "settings they were drawn with: give another --pictures."
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Entries in which two nested dictionaries differ, as ``name: old -> new``."""
    before, after = flatten(old), flatten(new)
    names = [*before, *(name for name in after if name not in before)]
    missing = "(not there)"
    return [
        f"{name}: {before.get(name, missing)!r} -> {after.get(name, missing)!r}"
        for name in names
        if before.get(name, missing) != after.get(name, missing)
    ]


def read_about(folder: Path) -> dict[str, Any] | None:
    """What ``pictures.json`` says; None where there is none.

    Raises:
        WadiError: if it is damaged.
    """
    path = folder / ABOUT
    if not exists(path):
        return None
    remedy = "It is no longer as `wadi eval` wrote it: remove the folder."
    about: dict[str, Any] = read_json(path, dict[str, Any], "Description of generated images", remedy=remedy)
    convert(about, About, f"Description of generated images {str(path)!r}", remedy)
    return about
