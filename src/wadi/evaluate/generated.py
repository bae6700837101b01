"""Generated images of a protocol, in a folder. Generation can be interrupted, and several processes can share it.

Image ``i`` is ``000123.png``: prompt ``i`` from the noise of seed ``i``, drawn on the CPU for this image alone, so neither the
batch nor the process changes it. Each file is written completely or not at all, and an existing file is done: the same command
generates only missing images. ``pictures.json`` in the folder describes everything that the images depend on, and
``prompts.jsonl`` has the prompt and the seed of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.evaluate.generators import LIBRARIES, Generator
from wadi.io.files import write_whole
from wadi.io.grids import encode_png
from wadi.io.progress import progress
from wadi.io.records import Record, as_json, convert, flatten, read_json
from wadi.io.regular import exists
from wadi.io.versions import installed_versions
from wadi.parallel.ranks import Ranks
from wadi.pipelines.generate import Sampling, generate_images

ABOUT, PROMPTS = "pictures.json", "prompts.jsonl"


class About(Record):
    """``pictures.json``: everything that the images depend on."""

    generator: dict[str, Any]
    prompts: dict[str, Any]
    seeds: str


def file_name(index: int) -> str:
    """Return the file name of image ``index``. Names sort as the images do."""
    return f"{index:06d}.png"


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return the hex digest of texts in their order, each preceded by its length."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = prompt.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def seeds_digest(seeds: Sequence[int]) -> str:
    """Return the hex digest of seeds in their order."""
    return hashlib.sha256(",".join(map(str, seeds)).encode()).hexdigest()


def generate_missing(
    generator: Generator, prompts: Sequence[str], seeds: Sequence[int], folder: Path, batch: int = 8, ranks: Ranks | None = None
) -> int:
    """Generate the images that ``folder`` lacks. Each of several processes generates a share, and all wait for the last.

    Returns:
        How many images this process generated.
    Raises:
        WadiError: if the folder contains images of other settings (the message names them), or cannot be written.
    """
    ranks = ranks or Ranks()
    about = {
        "generator": generator.about,
        "prompts": {"count": len(prompts), "sha256": prompts_digest(prompts)},
        "seeds": seeds_digest(seeds),
        "libraries": installed_versions(LIBRARIES),
    }
    ranks.on_first(lambda: _write_or_check_about(folder, about, prompts, seeds))
    missing = [i for i in range(ranks.index, len(prompts), ranks.count) if not (folder / file_name(i)).exists()]
    if missing:
        pipeline = generator.open()
        with progress(f"generating {generator.name}", len(missing), quiet=ranks.index > 0) as bar:
            for first in range(0, len(missing), batch):
                rows = missing[first : first + batch]
                result = generate_images(
                    pipeline, [prompts[i] for i in rows], [seeds[i] for i in rows],
                    Sampling(generator.steps, generator.guidance_scale, batch=len(rows)),
                )  # fmt: skip
                for i, image in zip(rows, result.images, strict=True):
                    # a third larger than the smallest file, and several times faster to write
                    write_whole(folder / file_name(i), encode_png(image, compress_level=3))
                bar.advance(by=len(rows))
    ranks.wait_for_all()
    return len(missing)


def _write_or_check_about(folder: Path, about: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write ``pictures.json`` and ``prompts.jsonl``, or check that existing ones say the same."""
    existing = read_about(folder)
    if existing is None:
        lines = (json.dumps({"file": file_name(i), "prompt": p, "seed": seeds[i]}) for i, p in enumerate(prompts))
        write_whole(folder / PROMPTS, ("\n".join(lines) + "\n").encode())
        write_whole(folder / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    elif changes := differences(existing, as_json(about)):
        raise WadiError(
            f"Folder {str(folder)!r} already contains images from a different run: {'; '.join(changes)}. Choose a new "
            "folder with --pictures."
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the entries in which two nested dictionaries differ, as ``name: old -> new``."""
    old_entries, new_entries = flatten(old), flatten(new)
    names = [*old_entries, *(name for name in new_entries if name not in old_entries)]
    missing = "(missing)"
    return [
        f"{name}: {old_entries.get(name, missing)!r} -> {new_entries.get(name, missing)!r}"
        for name in names
        if old_entries.get(name, missing) != new_entries.get(name, missing)
    ]


def read_about(folder: Path) -> dict[str, Any] | None:
    """Read ``pictures.json``, or return None if there is none.

    Raises:
        WadiError: if it is damaged.
    """
    path = folder / ABOUT
    if not exists(path):
        return None
    remedy = "It was changed after `wadi eval` wrote it. Remove the folder."
    about: dict[str, Any] = read_json(path, dict[str, Any], "Description of generated images", remedy=remedy)
    convert(about, About, f"Description of generated images {str(path)!r}", remedy)
    return about
