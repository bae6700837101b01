"""Larger pictures than the model was trained for: plain against re-dilated, seen and measured on the embedded student.

    python examples/highres.py            # writes docs/images/highres.png and the table of docs/highres.md

Three numbers per way of drawing, over sets of seeds. *Named*: is a square window of the picture's height, shrunk to the
training size, recognised as what was asked for (any window of a wide picture)? *Small copies*: the share of windows of the
training size, half a window apart, in which it is recognised, too: a whole object in each is what repetition looks like.
*Objects*: separate regions that differ from the background and cover at least 3 % of the height squared.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from report import SEED_STEP, machine, rewrite, row, small, tensor
from wadi import zoo
from wadi.extras.high_resolution.resize import enlarged, resize
from wadi.io import grids
from wadi.pipelines import generate, load

NATIVE = (64, 64)
SQUARE, WIDE = (128, 128), (128, 224)
WINDOW = 64
SMALLEST = 0.03  # of the height squared: a region is an object from here on
SHOWN = ["red apple", "cat face, fluent style", "rocket, on a black background", "penguin, on a pink background"]
TIMED = 8  # pictures
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 2.5

Way = Callable[[], AbstractContextManager]


def ways(pipeline: object, size: tuple[int, int]) -> dict[str, Way]:
    """Ways of drawing at ``size``, by name."""

    def way(**options: object) -> Way:
        return lambda: enlarged(pipeline, NATIVE, size, **options)

    found = {
        "plain": nullcontext,
        "re-dilated 2, deepest blocks (default)": way(),
        "re-dilated 2, all blocks": way(blocks="all"),
    }
    if size == SQUARE:
        return found | {
            "re-dilated 1.5, all blocks": way(factor=1.5, blocks="all"),
            "dispersed 2, all blocks": way(blocks="all", disperse=True),
        }
    return found | {
        "re-dilated 3.5, all blocks": way(factor=3.5, blocks="all"),
        "re-dilated 2 x 3.5, all blocks": way(factor=(2.0, 3.5), blocks="all"),
    }


def drawn(pipeline: object, way: Way, prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> generate.Generated:
    """Pictures, and milliseconds of each."""
    with way():
        return generate.generate_images(pipeline, prompts, seeds, generate.Sampling(batch=batch))


def windows(x: Tensor, side: int, step: int) -> Tensor:
    """Square windows of ``(B, 3, H, W)``: ``(B, windows, 3, side, side)``."""
    found = x.unfold(2, side, step).unfold(3, side, step)
    return found.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def recognised(judge: zoo.Classifier, parts: Tensor, concepts: Sequence[str]) -> Tensor:
    """Whether each of ``(B, windows, 3, s, s)`` is named as its picture's concept: booleans ``(B, windows)``."""
    x = parts.flatten(0, 1)
    if x.shape[-1] != WINDOW:
        x = F.interpolate(x, size=(WINDOW, WINDOW), mode="area")
    with torch.no_grad():
        best = torch.cat([judge.logits(part).argmax(1) for part in x.split(128)]).view(parts.shape[:2])
    wanted = torch.tensor([judge.concepts.index(concept) for concept in concepts])
    return best == wanted[:, None]


def objects(x: Tensor, away: float = 0.15) -> Tensor:
    """Separate regions of each picture ``(B, 3, H, W)`` that differ from the border's median colour: ``(B,)``."""
    border = torch.cat([x[..., :2, :].flatten(2), x[..., -2:, :].flatten(2), x[..., :2].flatten(2), x[..., -2:].flatten(2)], 2)
    ground = border.median(2).values[..., None, None]
    figure = ((x - ground).abs().amax(1, keepdim=True) > away).float()
    figure = 1 - F.max_pool2d(1 - F.max_pool2d(figure, 3, 1, 1), 3, 1, 1)  # gaps of a pixel do not part an object
    label = figure * torch.arange(1.0, figure[0].numel() + 1).view(1, 1, *figure.shape[2:])
    while True:  # the largest number spreads over its region
        spread = F.max_pool2d(label, 3, 1, 1) * figure
        if torch.equal(spread, label):
            break
        label = spread
    least = SMALLEST * x.shape[2] ** 2
    counts = [(part[part > 0].unique(return_counts=True)[1] >= least).sum() for part in label]
    return torch.stack(counts).float()


def measures(judge: zoo.Classifier, pictures: Sequence[Image.Image], concepts: Sequence[str]) -> tuple[float, float, float]:
    """``(named, small copies, objects)``; see the module."""
    x = tensor(pictures)
    named = recognised(judge, windows(x, x.shape[2], WINDOW // 2), concepts).any(1).float().mean()
    copies = recognised(judge, windows(x, WINDOW, WINDOW // 2), concepts).float().mean()
    return float(named), float(copies), float(objects(x).mean())


def measured(judge: zoo.Classifier, rows: Sequence[tuple[str, str, int]], sets: int, draw: Callable) -> str:
    """Cells of a table: mean and standard deviation over sets of seeds."""
    prompts, concepts, seeds = (list(column) for column in zip(*rows, strict=True))
    found = []
    for offset in range(SEED_STEP, SEED_STEP * (sets + 1), SEED_STEP):
        found.append(measures(judge, draw(prompts, [offset + seed for seed in seeds]).pictures, concepts))
    ms = draw(prompts[:TIMED], seeds[:TIMED], batch=1).ms_per_image
    cells = [f"{statistics.fmean(c):.2f} ± {statistics.stdev(c) if sets > 1 else 0:.2f}" for c in zip(*found, strict=True)]
    return " | ".join([*cells, f"{ms:.0f}"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, help="run of the student; default: the embedded one")
    parser.add_argument("--count", type=int, default=36, help="prompts a set, one of every second concept")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--page", type=Path, default=Path("docs/highres.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/highres.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, judge = load.load(args.run), zoo.load_classifier()
    rows = zoo.eval_prompts()[: 2 * args.count : 2]
    head = "| named | small copies | objects | ms |"
    table, sheets = [f"| drawn in one step {head}", "|---|---|---|---|---|"], []

    def stretched(prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> generate.Generated:
        one = drawn(pipeline, nullcontext, prompts, seeds, batch)
        larger = [picture.resize(SQUARE[::-1], Image.Resampling.BICUBIC) for picture in one.pictures]
        return generate.Generated(larger, one.ms_per_image)

    table.append(row("64 x 64, enlarged to 128 x 128 (what is right)", measured(judge, rows, args.sets, stretched)))
    shown = {"64 x 64,\nenlarged": stretched(SHOWN, range(len(SHOWN))).pictures}
    for size in (SQUARE, WIDE):
        resize(pipeline, size)
        for name, way in ways(pipeline, size).items():
            label = f"{size[1]} x {size[0]}, {name}"
            table.append(row(label, measured(judge, rows, args.sets, partial(drawn, pipeline, way))))
            print(table[-1], flush=True)
            shown[label.replace(", ", ",\n")] = drawn(pipeline, way, SHOWN, range(len(SHOWN))).pictures
        sheets.append(grids.compose_grid(list(shown.values()), list(shown), SHOWN))
        shown = {}
    slow = load.load_teacher_pipeline(args.run)
    resize(slow, SQUARE)

    def many(prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> generate.Generated:
        with enlarged(slow, NATIVE, SQUARE):
            return generate.generate_images(slow, prompts, seeds, generate.Sampling(TEACHER_STEPS, TEACHER_GUIDANCE, batch))

    name = f"128 x 128, re-dilated 2, deepest blocks, the teacher in {TEACHER_STEPS} steps (one set)"
    table.append(row(name, measured(judge, rows, 1, many)))
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(s.height for s in sheets[:i])))
    grids.save_png(small(whole), args.picture)
    note = f"{args.count} prompts, mean ± standard deviation over {args.sets} sets of seeds; ms of one picture at a time. "
    rewrite(args.page, "table", "\n".join([*table, "", note + machine()]))


if __name__ == "__main__":
    main()
