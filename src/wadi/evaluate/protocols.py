"""Protocols by name: prompts, seeds, reference images, image size and metrics.

Everything in `Protocol.settings` goes into the hash of a result. The generator (its weights, steps, guidance) does not: a
protocol is what two generators must share for their metrics to be comparable.

Seeds: image ``i`` of set ``s`` has the seed ``s * SEED_STEP + i``. Set 0 is the reference if a teacher generates it.
Generators are measured on set 1 by default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.evaluate.coco import choose, open_coco, read_chosen
from wadi.evaluate.generated import prompts_digest
from wadi.prompts.reading import read_prompts

SEED_STEP = 1_000_000  # between sets
VARIED_SEEDS = 500_000  # from the first seed of a set to the first of its images for diversity
VARIED_PROMPTS, IMAGES_EACH = 12, 8  # of the images for diversity
ZOO_STEPS, ZOO_GUIDANCE = 25, 2.5  # of the embedded teacher's reference images

COCO = {"coco2014-30k": ("val2014", 30_000), "coco2017-5k": ("val2017", 5_000)}
NAMES = ("zoo", *COCO)


@dataclass(frozen=True)
class Protocol:
    """The prompts and seeds of generated images, and the reference that they are compared with.

    Attributes:
        prompts: one for each image.
        varied: prompts for diversity, with `IMAGES_EACH` images each.
        size: side in pixels that images are resized to; None = as they are.
        reference: files of the reference; None if a teacher generates it, or there is none.
        settings: the part of the hash that depends on these attributes.
        metrics, features: defaults of the command.
        labels: the concept that each prompt names, where a classifier can check it.
    """

    name: str
    prompts: Sequence[str]
    varied: Sequence[str]
    size: int | None
    reference: Sequence[Path] | None
    settings: dict[str, Any]
    metrics: tuple[str, ...]
    features: str
    labels: Sequence[str] | None = field(default=None, repr=False)

    def seeds(self, set_number: int) -> list[int]:
        """Return the seeds of the images of a set."""
        return [set_number * SEED_STEP + i for i in range(len(self.prompts))]

    def varied_rows(self, set_number: int) -> tuple[list[str], list[int]]:
        """Return prompts and seeds of the images for diversity, with those of one prompt together."""
        prompts = [prompt for prompt in self.varied for _ in range(IMAGES_EACH)]
        return prompts, [set_number * SEED_STEP + VARIED_SEEDS + i for i in range(len(prompts))]


def coco(name: str, root: str | Path, seed: int = 0, ids: str | Path | None = None, count: int | None = None) -> Protocol:
    """Return ``coco2014-30k`` or ``coco2017-5k`` from a COCO folder, at 256 pixels. The reference is every image of the split.

    Args:
        root: contains ``annotations/captions_val2014.json`` and ``val2014/`` (or those of 2017).
        seed: of the choice of captions; see `wadi.evaluate.coco`.
        ids: file of annotation ids to use instead.
        count: use fewer prompts than the name says, for a quick look. The hash is then different.
    Raises:
        WadiError: if the folder is incomplete (the message names the file), or it lacks one of the ids.
    """
    split, usual = COCO[name]
    source = open_coco(root, split)
    chosen = read_chosen(source, ids) if ids is not None else choose(source, count or usual, seed)
    prompts = [caption for _, caption in chosen]
    rule = {"ids": "listed"} if ids is not None else {"ids": f"sha256 order, seed {seed}, first caption"}
    settings = {
        "prompts": _prompt_settings(prompts) | rule | {"ids_sha256": _digest(str(number) for number, _ in chosen)},
        "reference": {
            "kind": f"{split}, all images",
            "count": len(source.images),
            "ids_sha256": _digest(map(str, source.images)),
        },
    }
    files = list(source.images.values())
    return Protocol(name, prompts, _evenly_chosen(prompts), 256, files, settings, ("fid", "kid", "pr", "clip"), "inception")


def prompt_file(path: str | Path, size: int | None = None, count: int | None = None) -> Protocol:
    """Return a protocol of the prompts in any file that `wadi distill` takes. The command chooses the reference."""
    prompts = read_prompts(path)[:count]
    return Protocol(
        "prompts",
        prompts,
        _evenly_chosen(prompts),
        size,
        None,
        {"prompts": _prompt_settings(prompts)},
        ("fd", "kd", "pr"),
        "embedded",
    )


def zoo(count: int | None = None) -> Protocol:
    """Return the embedded teacher's fixed prompts. The reference is its own many-step images of them, from other noise."""
    from wadi.zoo.prompts import eval_prompts

    prompts, labels, _ = (list(column) for column in zip(*eval_prompts()[:count], strict=True))
    concepts = list(dict.fromkeys(label for _, label, _ in eval_prompts()))
    varied = concepts[:: len(concepts) // VARIED_PROMPTS][:VARIED_PROMPTS]
    metrics = ("fd", "kd", "pr", "fd-zoo", "top1", "diversity")
    return Protocol("zoo", prompts, varied, None, None, {"prompts": _prompt_settings(prompts)}, metrics, "embedded", labels)


def _prompt_settings(prompts: Sequence[str]) -> dict[str, Any]:
    """Return the number and the digest of the prompts, for the hash."""
    if not prompts:
        raise WadiError("The protocol has no prompts. Set --count to at least 1.")
    return {"count": len(prompts), "sha256": prompts_digest(prompts)}


def _digest(words: Any) -> str:
    return hashlib.sha256(",".join(words).encode()).hexdigest()


def _evenly_chosen(prompts: Sequence[str]) -> list[str]:
    """Return a dozen different prompts, evenly over the list."""
    different = list(dict.fromkeys(prompts))
    return (
        [different[i * len(different) // VARIED_PROMPTS] for i in range(VARIED_PROMPTS)]
        if len(different) > VARIED_PROMPTS
        else different
    )
