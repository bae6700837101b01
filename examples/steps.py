"""More steps of a one-step student, and pictures started from pictures: seen and measured on the embedded student.

    python examples/steps.py              # writes docs/images/steps.png and the tables of docs/steps.md

Steps: the measures of `wadi.zoo.evaluate` (Frechet distance to the teacher's pictures in a classifier's features, top-1,
diversity within a prompt, milliseconds). Image to image: a picture of one concept is redrawn under the prompt of another;
counted is how often the classifier names the one and the other, and how far the pixels have moved.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from wadi.zoo.evaluate import SEED_STEP, evaluate, table

from report import machine, rewrite, row, small
from wadi import zoo
from wadi.backbones import from_pipeline
from wadi.extras.image_to_image import image_tensor, start
from wadi.extras.steps import schedule
from wadi.io import grids
from wadi.pipelines import generate

STEPS = (1, 2, 4, 8)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SHOWN = ["red apple", "cat face, fluent style", "rocket, on a black background", "pizza, noto style, on a blue background",
         "penguin, on a pink background", "sunflower, twemoji style, on a green background"]  # fmt: skip
TURNED = ["pear", "fox, fluent style", "sailboat, on a black background", "hamburger, noto style, on a red background",
          "owl, on a pink background", "rose, twemoji style, on a green background"]  # fmt: skip


def tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """``(B, 3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255


class Student:
    """A one-step pipeline that is asked in other ways, and put back after each."""

    def __init__(self, run: str | None) -> None:
        self.pipeline = generate.load(run)
        self.own = self.pipeline.scheduler

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int = 1, batch: int = 64) -> list[Image.Image]:
        """Pictures in ``steps`` steps."""
        found = schedule(self.own, steps)
        self.pipeline.scheduler = found.scheduler
        return generate.draw(self.pipeline, prompts, seeds, batch=batch, call=found.call).pictures

    def redraw(self, picture: Image.Image, prompt: str, seed: int, strength: float, steps: int = 1) -> Image.Image:
        """``picture`` under another prompt."""
        found = schedule(self.own, steps, strength)
        self.pipeline.scheduler = found.scheduler
        begin = start(from_pipeline(self.pipeline), image_tensor(picture, picture.size[::-1]), found)
        return generate.draw(self.pipeline, [prompt], [seed], call=found.call, start=begin).pictures[0]


def steps_table(student: Student, teacher: Callable, judge: zoo.Classifier, args: argparse.Namespace) -> str:
    """Quality against steps."""

    def drawer(steps: int) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
        return lambda prompts, seeds: tensor(student.draw(prompts, seeds, steps))

    drawers = {f"teacher, {args.teacher_steps} steps (other noise; one set)": teacher}
    drawers |= {f"{steps} step{'s' * (steps > 1)}": drawer(steps) for steps in STEPS}
    return table(evaluate(drawers, teacher, judge, args.sets, args.count))


def strength_table(student: Student, judge: zoo.Classifier, sets: int, count: int) -> str:
    """What becomes of a picture of one concept under the prompt of another."""
    lines = ["| strength | named as the prompt | still named as the picture | pixels moved (RMS of 255) |", "|---|---|---|---|"]
    rows = zoo.eval_prompts()[:count]
    prompts, concepts = [rows[(i + count // 2) % count][0] for i in range(count)], [concept for _, concept, _ in rows]
    wanted = [rows[(i + count // 2) % count][1] for i in range(count)]
    for strength in STRENGTHS:
        found = []
        for offset in range(SEED_STEP, SEED_STEP * (sets + 1), SEED_STEP):
            before = student.draw([prompt for prompt, _, _ in rows], [offset + seed for _, _, seed in rows])
            after = [student.redraw(p, prompts[i], offset + 5000 + i, strength) for i, p in enumerate(before)]
            x, y = tensor(before), tensor(after)
            moved = 255 * float(((x - y) ** 2).mean((1, 2, 3)).sqrt().mean())
            found.append((judge.top1(y, wanted), judge.top1(y, concepts), moved))
        columns = list(zip(*found, strict=True))
        spread = [statistics.stdev(c) if sets > 1 else 0.0 for c in columns]
        means = [statistics.fmean(c) for c in columns]
        cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(means[:2], spread[:2], strict=True)]
        lines.append(row(f"{strength:g}", *cells, f"{means[2]:.0f} ± {spread[2]:.0f}"))
    return "\n".join(lines)


def sheet(student: Student, teacher: Callable, teacher_steps: int) -> Image.Image:
    """Rows of steps, the teacher's below, and rows of strengths."""
    seeds = list(range(len(SHOWN)))
    rows = {f"{steps} step{'s' * (steps > 1)}": student.draw(SHOWN, seeds, steps) for steps in STEPS}
    rows[f"teacher,\n{teacher_steps} steps"] = [grids.to_pil(one) for one in teacher(SHOWN, seeds)]
    first = grids.grid(list(rows.values()), list(rows), SHOWN, 2)
    rows = {"init": rows["1 step"]}
    for strength in STRENGTHS:
        row_of = [student.redraw(p, t, 100 + i, strength) for i, (p, t) in enumerate(zip(rows["init"], TURNED, strict=True))]
        rows[f"strength\n{strength:g}"] = row_of
    second = grids.grid(list(rows.values()), list(rows), TURNED, 2)
    whole = Image.new("RGB", (max(first.width, second.width), first.height + second.height), "white")
    whole.paste(first, (0, 0))
    whole.paste(second, (0, first.height))
    return whole


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, help="run of the student; default: the embedded one")
    parser.add_argument("--count", type=int, default=48, help="prompts a set")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--teacher_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="of the teacher")
    parser.add_argument("--page", type=Path, default=Path("docs/steps.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/steps.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    student, judge, slow = Student(args.run), zoo.load_classifier(), generate.teacher_of(args.run)

    def teacher(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return tensor(generate.draw(slow, prompts, seeds, args.teacher_steps, args.guidance_scale, batch=64).pictures)

    grids.save_png(small(sheet(student, teacher, args.teacher_steps)), args.picture)
    note = (
        f"± is the standard deviation over {args.sets} sets of seeds (of ms: half the distance of the quartiles). {machine()}"
    )
    few = args.count // 2
    rewrite(args.page, "strengths", f"{strength_table(student, judge, args.sets, few)}\n\n{few} pictures a set. {note}")
    rewrite(args.page, "steps", f"{steps_table(student, teacher, judge, args)}\n\n{args.count} prompts a set. {note}")


if __name__ == "__main__":
    main()
