"""Compare methods for images larger than the training size, plain and re-dilated, with the embedded student.

    python examples/highres.py            # writes docs/images/highres.png and the table of docs/highres.md

There are three metrics for each method, over sets of seeds. *Named*: the share of images in which the prompt's concept is
recognised in a square window of the image's height, shrunk to the training size (in any window of a wide image). *Small
copies*: the share of windows of the training size, half a window apart, in which the concept is recognised: a whole object in
each of them is repetition. *Objects*: the number of separate regions that differ from the background and cover at least 3 % of
the height squared.
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
from wadi.extras.high_resolution.resize import enlarged, set_resolution
from wadi.io import grids
from wadi.pipelines import generate, load

NATIVE = (64, 64)
SQUARE, WIDE = (128, 128), (128, 224)
WINDOW = 64
SMALLEST = 0.03  # smallest area of an object, as a share of the height squared
SHOWN = ["red apple", "cat face, fluent style", "rocket, on a black background", "penguin, on a pink background"]
TIMED = 8  # images
TEACHER_STEPS, TEACHER_GUIDANCE = 25, 2.5

Method = Callable[[], AbstractContextManager]


def methods(pipeline: object, size: tuple[int, int]) -> dict[str, Method]:
    """Return the methods for images of ``size`` by name, each as a function that returns a context."""

    def method(**options: object) -> Method:
        return lambda: enlarged(pipeline, NATIVE, size, **options)

    common = {
        "plain": nullcontext,
        "re-dilated 2, deepest blocks (default)": method(),
        "re-dilated 2, all blocks": method(blocks="all"),
    }
    if size == SQUARE:
        return common | {
            "re-dilated 1.5, all blocks": method(factor=1.5, blocks="all"),
            "dispersed 2, all blocks": method(blocks="all", disperse=True),
        }
    return common | {
        "re-dilated 3.5, all blocks": method(factor=3.5, blocks="all"),
        "re-dilated 2 x 3.5, all blocks": method(factor=(2.0, 3.5), blocks="all"),
    }


def generated(
    pipeline: object, method: Method, prompts: Sequence[str], seeds: Sequence[int], batch: int = 16
) -> generate.Generated:
    """Generate images, and measure the milliseconds of each."""
    with method():
        return generate.generate_images(pipeline, prompts, seeds, generate.Sampling(batch=batch))


def windows(x: Tensor, side: int, step: int) -> Tensor:
    """Return the square windows of ``(B, 3, H, W)``: ``(B, windows, 3, side, side)``."""
    unfolded = x.unfold(2, side, step).unfold(3, side, step)
    return unfolded.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def recognised(judge: zoo.Classifier, parts: Tensor, concepts: Sequence[str]) -> Tensor:
    """Return whether the judge recognises each image's concept in windows ``(B, windows, 3, s, s)``: ``(B, windows)``."""
    x = parts.flatten(0, 1)
    if x.shape[-1] != WINDOW:
        x = F.interpolate(x, size=(WINDOW, WINDOW), mode="area")
    with torch.no_grad():
        best = torch.cat([judge.logits(part).argmax(1) for part in x.split(128)]).view(parts.shape[:2])
    expected = torch.tensor([judge.concepts.index(concept) for concept in concepts])
    return best == expected[:, None]


def objects(x: Tensor, away: float = 0.15) -> Tensor:
    """Count the separate regions of each image ``(B, 3, H, W)`` that differ from the border's median colour: ``(B,)``."""
    border = torch.cat([x[..., :2, :].flatten(2), x[..., -2:, :].flatten(2), x[..., :2].flatten(2), x[..., -2:].flatten(2)], 2)
    ground = border.median(2).values[..., None, None]
    figure = ((x - ground).abs().amax(1, keepdim=True) > away).float()
    figure = 1 - F.max_pool2d(1 - F.max_pool2d(figure, 3, 1, 1), 3, 1, 1)  # a gap of one pixel does not split an object
    label = figure * torch.arange(1.0, figure[0].numel() + 1).view(1, 1, *figure.shape[2:])
    while True:  # the largest label spreads over its region
        spread = F.max_pool2d(label, 3, 1, 1) * figure
        if torch.equal(spread, label):
            break
        label = spread
    least = SMALLEST * x.shape[2] ** 2
    counts = [(part[part > 0].unique(return_counts=True)[1] >= least).sum() for part in label]
    return torch.stack(counts).float()


def measures(judge: zoo.Classifier, pictures: Sequence[Image.Image], concepts: Sequence[str]) -> tuple[float, float, float]:
    """Return ``(named, small copies, objects)``; see the module."""
    x = tensor(pictures)
    named = recognised(judge, windows(x, x.shape[2], WINDOW // 2), concepts).any(1).float().mean()
    copies = recognised(judge, windows(x, WINDOW, WINDOW // 2), concepts).float().mean()
    return float(named), float(copies), float(objects(x).mean())


def measured(judge: zoo.Classifier, rows: Sequence[tuple[str, str, int]], sets: int, draw: Callable) -> str:
    """Return a row's cells: mean and standard deviation of each metric over sets of seeds, and milliseconds."""
    prompts, concepts, seeds = (list(column) for column in zip(*rows, strict=True))
    metrics = []
    for offset in range(SEED_STEP, SEED_STEP * (sets + 1), SEED_STEP):
        metrics.append(measures(judge, draw(prompts, [offset + seed for seed in seeds]).images, concepts))
    ms = draw(prompts[:TIMED], seeds[:TIMED], batch=1).ms_per_image
    cells = [f"{statistics.fmean(c):.2f} ± {statistics.stdev(c) if sets > 1 else 0:.2f}" for c in zip(*metrics, strict=True)]
    return " | ".join([*cells, f"{ms:.0f}"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, help="run of the student (default: the embedded student)")
    parser.add_argument("--count", type=int, default=36, help="prompts per set, one for every second concept (default 36)")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--page", type=Path, default=Path("docs/highres.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/highres.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline, judge = load.load(args.run), zoo.load_classifier()
    rows = zoo.eval_prompts()[: 2 * args.count : 2]
    head = "| named | small copies | objects | ms |"
    table, sheets = [f"| generated in one step {head}", "|---|---|---|---|---|"], []

    def stretched(prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> generate.Generated:
        one = generated(pipeline, nullcontext, prompts, seeds, batch)
        larger = [picture.resize(SQUARE[::-1], Image.Resampling.BICUBIC) for picture in one.images]
        return generate.Generated(larger, one.ms_per_image)

    table.append(row("64 x 64, enlarged to 128 x 128 (the target)", measured(judge, rows, args.sets, stretched)))
    shown = {"64 x 64,\nenlarged": stretched(SHOWN, range(len(SHOWN))).images}
    for size in (SQUARE, WIDE):
        set_resolution(pipeline, size)
        for name, method in methods(pipeline, size).items():
            label = f"{size[1]} x {size[0]}, {name}"
            table.append(row(label, measured(judge, rows, args.sets, partial(generated, pipeline, method))))
            print(table[-1], flush=True)
            shown[label.replace(", ", ",\n")] = generated(pipeline, method, SHOWN, range(len(SHOWN))).images
        sheets.append(grids.compose_grid(list(shown.values()), list(shown), SHOWN))
        shown = {}
    slow = load.load_teacher_pipeline(args.run)
    set_resolution(slow, SQUARE)

    def many(prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> generate.Generated:
        with enlarged(slow, NATIVE, SQUARE):
            return generate.generate_images(slow, prompts, seeds, generate.Sampling(TEACHER_STEPS, TEACHER_GUIDANCE, batch))

    name = f"128 x 128, re-dilated 2, deepest blocks, the teacher in {TEACHER_STEPS} steps (one set)"
    table.append(row(name, measured(judge, rows, 1, many)))
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(s.height for s in sheets[:i])))
    grids.save_png(small(whole), args.picture)
    note = f"{args.count} prompts, mean ± standard deviation over {args.sets} sets of seeds; ms for one image at a time. "
    rewrite(args.page, "table", "\n".join([*table, "", note + machine()]))


if __name__ == "__main__":
    main()
