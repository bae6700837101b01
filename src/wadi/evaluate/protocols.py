"""Protocols by name: which prompts and seeds, which pictures they are held against, at which size, judged by what.

Everything in `Protocol.settings` goes into the hash of a result; what is measured (weights, steps, guidance of the generator)
does not: a protocol is what two generators must share for their numbers to be comparable.

Seeds: picture ``i`` of set ``s`` has the seed ``s * SEED_STEP + i``. Set 0 is the reference where a teacher draws it; a
generator is measured on set 1 unless told otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.evaluate.coco import choose, listed, open_coco
from wadi.evaluate.drawn import prompts_digest
from wadi.prompts.reading import read_prompts

SEED_STEP = 1_000_000  # between sets
VARIED_SEEDS = 500_000  # from a set's first seed to that of its pictures for diversity
VARIED_PROMPTS, PICTURES_EACH = 12, 8  # of those pictures
ZOO_STEPS, ZOO_GUIDANCE = 25, 2.5  # of the embedded teacher's reference pictures

COCO = {"coco2014-30k": ("val2014", 30_000), "coco2017-5k": ("val2017", 5_000)}
NAMES = ("zoo", *COCO)


@dataclass(frozen=True)
class Protocol:
    """What is drawn, and what it is held against.

    Attributes:
        prompts: one per picture.
        varied: prompts of which `PICTURES_EACH` pictures each tell the diversity.
        size: side in pixels that pictures are brought to; None = as they are.
        reference: files of the reference, or None where a teacher draws it (or there is none).
        settings: what goes into the hash about all this.
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
        """Of the pictures of a set."""
        return [set_number * SEED_STEP + i for i in range(len(self.prompts))]

    def varied_rows(self, set_number: int) -> tuple[list[str], list[int]]:
        """Prompts and seeds of the pictures for diversity, those of one prompt together."""
        prompts = [prompt for prompt in self.varied for _ in range(PICTURES_EACH)]
        return prompts, [set_number * SEED_STEP + VARIED_SEEDS + i for i in range(len(prompts))]


def coco(name: str, root: str | Path, seed: int = 0, ids: str | Path | None = None, count: int | None = None) -> Protocol:
    """``coco2014-30k`` or ``coco2017-5k`` from a COCO folder at 256 pixels; the reference is every image of the split.

    Args:
        root: holds ``annotations/captions_val2014.json`` and ``val2014/`` (or those of 2017).
        seed: of the choice of captions; see `wadi.evaluate.coco`.
        ids: file of annotation ids to take instead.
        count: fewer prompts than the name says, for a look: another protocol by its hash.
    Raises:
        WadiError: if the folder is incomplete (which file), or the ids are not its own.
    """
    split, usual = COCO[name]
    source = open_coco(root, split)
    chosen = listed(source, ids) if ids is not None else choose(source, count or usual, seed)
    prompts = [caption for _, caption in chosen]
    rule = {"ids": "listed"} if ids is not None else {"ids": f"sha256 order, seed {seed}, first caption"}
    settings = {
        "prompts": _told(prompts) | rule | {"ids_sha256": _digest(str(number) for number, _ in chosen)},
        "reference": {
            "kind": f"{split}, all images",
            "count": len(source.images),
            "ids_sha256": _digest(map(str, source.images)),
        },
    }
    files = list(source.images.values())
    return Protocol(name, prompts, _spread(prompts), 256, files, settings, ("fid", "kid", "pr", "clip"), "inception")


def prompt_file(path: str | Path, size: int | None = None, count: int | None = None) -> Protocol:
    """The prompts of any file that `wadi distill` takes; the reference is for the command to name."""
    prompts = read_prompts(path)[:count]
    return Protocol(
        "prompts", prompts, _spread(prompts), size, None, {"prompts": _told(prompts)}, ("fd", "kd", "pr"), "embedded"
    )


def zoo(count: int | None = None) -> Protocol:
    """The embedded teacher's fixed prompts; the reference is its own many-step pictures of them, from other noise."""
    from wadi.zoo.prompts import eval_prompts

    prompts, labels, _ = (list(column) for column in zip(*eval_prompts()[:count], strict=True))
    concepts = list(dict.fromkeys(label for _, label, _ in eval_prompts()))
    varied = concepts[:: len(concepts) // VARIED_PROMPTS][:VARIED_PROMPTS]
    metrics = ("fd", "kd", "pr", "fd-zoo", "top1", "diversity")
    return Protocol("zoo", prompts, varied, None, None, {"prompts": _told(prompts)}, metrics, "embedded", labels)


def _told(prompts: Sequence[str]) -> dict[str, Any]:
    if not prompts:
        raise WadiError("The protocol has no prompt. Expected --count of at least 1.")
    return {"count": len(prompts), "sha256": prompts_digest(prompts)}


def _digest(words: Any) -> str:
    return hashlib.sha256(",".join(words).encode()).hexdigest()


def _spread(prompts: Sequence[str]) -> list[str]:
    """A dozen different prompts, evenly over the list."""
    different = list(dict.fromkeys(prompts))
    return (
        [different[i * len(different) // VARIED_PROMPTS] for i in range(VARIED_PROMPTS)]
        if len(different) > VARIED_PROMPTS
        else different
    )
