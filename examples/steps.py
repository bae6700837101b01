"""More steps of a one-step student, and images started from images, measured on the embedded student.

    python examples/steps.py              # writes docs/images/steps.png and the tables of docs/steps.md

Steps: the metrics of `wadi eval --protocol zoo` (Frechet distance to the teacher's images in the features of the zoo's
classifier, top-1, diversity within a prompt), and milliseconds for each image. Image to image: an image of one concept is
generated again under the prompt of another. We count how often the classifier names each of the two, and how far the pixels
moved.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from report import SEED_STEP, latency, machine, rewrite, row, small, tensor
from wadi import zoo
from wadi.backbones import from_pipeline
from wadi.evaluate import protocols
from wadi.evaluate.evaluation import Evaluation
from wadi.evaluate.generators import Source
from wadi.evaluate.metric_table import Options
from wadi.evaluate.reference import teacher_reference
from wadi.evaluate.result_table import format_number
from wadi.extras.control.agreement import mean_and_spread
from wadi.extras.image_to_image import image_tensor, start_from
from wadi.extras.steps import schedule
from wadi.io import grids, markdown
from wadi.io.metric_names import metric_label
from wadi.pipelines import generate, load

STEPS = (1, 2, 4, 8)
METRICS = ("fd-zoo", "top1")
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SHOWN = ["red apple", "cat face, fluent style", "rocket, on a black background", "pizza, noto style, on a blue background",
         "penguin, on a pink background", "sunflower, twemoji style, on a green background"]  # fmt: skip
TURNED = ["pear", "fox, fluent style", "sailboat, on a black background", "hamburger, noto style, on a red background",
          "owl, on a pink background", "rose, twemoji style, on a green background"]  # fmt: skip


class Student:
    """A one-step pipeline that also generates in several steps, or from an image. Each call sets its scheduler."""

    def __init__(self, run: str | None) -> None:
        self.pipeline = load.load(run)
        self.one_step_scheduler = self.pipeline.scheduler

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int = 1, batch: int = 64) -> list[Image.Image]:
        """Generate images in ``steps`` steps."""
        several = schedule(self.one_step_scheduler, steps)
        self.pipeline.scheduler = several.scheduler
        return generate.generate_images(self.pipeline, prompts, seeds, generate.Sampling(batch=batch, call=several.call)).images

    def redraw(self, image: Image.Image, prompt: str, seed: int, strength: float, steps: int = 1) -> Image.Image:
        """Generate ``image`` again under another prompt."""
        partial = schedule(self.one_step_scheduler, steps, strength)
        self.pipeline.scheduler = partial.scheduler
        begin = start_from(from_pipeline(self.pipeline), image_tensor(image, image.size[::-1]), partial)
        return generate.generate_images(
            self.pipeline, [prompt], [seed], generate.Sampling(call=partial.call, start=begin)
        ).images[0]


def steps_table(student: Student, args: argparse.Namespace) -> str:
    """Return quality against steps, by the protocol, metrics and seeds of `wadi eval --protocol zoo`."""
    protocol, options = protocols.zoo(args.count), Options(features="zoo")
    teacher = Source("zoo", run=args.run).many_steps(args.teacher_steps, args.guidance_scale)
    with tempfile.TemporaryDirectory() as folder:
        whole = Evaluation([*METRICS, "diversity"], options, protocol, teacher_reference(teacher, protocol), folder)
        whole.generate([teacher])
        metrics = {teacher.name: whole.generated_row(teacher).metrics}
        quality = Evaluation(METRICS, options, protocol, whole.reference, folder)
        prompts, seeds = protocol.varied_rows(1)
        variety = Evaluation(["diversity"], options, prompts=prompts)
        for steps in STEPS:
            images = student.draw(protocol.prompts, protocol.seeds(1), steps)
            metrics[plural(steps)] = quality.row(images).metrics | variety.row(student.draw(prompts, seeds, steps)).metrics
    pipeline = teacher.open()
    ways: dict[str, Callable] = {
        teacher.name: lambda p, s: generate.generate_images(
            pipeline, p, s, generate.Sampling(args.teacher_steps, args.guidance_scale)
        ),
        **{plural(steps): partial(student.draw, steps=steps) for steps in STEPS},
    }
    rows = []
    for name, numbers in metrics.items():
        ms, deviation = latency(ways[name], protocol.prompts)
        rows.append([name, *map(format_number, numbers.values()), f"{ms:.0f} ± {deviation:.0f}"])
    return markdown.table(["", *map(metric_label, next(iter(metrics.values()))), "ms per image"], rows)


def plural(steps: int) -> str:
    """Return "1 step" or "4 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def strength_table(student: Student, judge: zoo.Classifier, sets: int, count: int) -> str:
    """Return what an image of one concept becomes under the prompt of another, for each strength."""
    lines = ["| strength | named as the prompt | still named as the image | pixels moved (RMS of 255) |", "|---|---|---|---|"]
    rows = zoo.eval_prompts()[:count]
    prompts, concepts = [rows[(i + count // 2) % count][0] for i in range(count)], [concept for _, concept, _ in rows]
    targets = [rows[(i + count // 2) % count][1] for i in range(count)]
    for strength in STRENGTHS:
        repetitions = []
        for offset in range(SEED_STEP, SEED_STEP * (sets + 1), SEED_STEP):
            before = student.draw([prompt for prompt, _, _ in rows], [offset + seed for _, _, seed in rows])
            after = [student.redraw(image, prompts[i], offset + 5000 + i, strength) for i, image in enumerate(before)]
            x, y = tensor(before), tensor(after)
            moved = 255 * float(((x - y) ** 2).mean((1, 2, 3)).sqrt().mean())
            repetitions.append((judge.top1(y, targets), judge.top1(y, concepts), moved))
        named, still_named, moved = (mean_and_spread(column) for column in zip(*repetitions, strict=True))
        cells = [f"{mean:.2f} ± {spread:.2f}" for mean, spread in (named, still_named)]
        lines.append(row(f"{strength:g}", *cells, "{:.0f} ± {:.0f}".format(*moved)))
    return "\n".join(lines)


def sheet(student: Student, teacher: Callable, teacher_steps: int) -> Image.Image:
    """Return a grid: a row for each number of steps, a row of the teacher, and a row for each strength."""
    seeds = list(range(len(SHOWN)))
    rows = {plural(steps): student.draw(SHOWN, seeds, steps) for steps in STEPS}
    rows[f"teacher,\n{teacher_steps} steps"] = [grids.to_pil(one) for one in teacher(SHOWN, seeds)]
    first = grids.compose_grid(list(rows.values()), list(rows), SHOWN, 2)
    rows = {"init": rows["1 step"]}
    for strength in STRENGTHS:
        row_of = [student.redraw(p, t, 100 + i, strength) for i, (p, t) in enumerate(zip(rows["init"], TURNED, strict=True))]
        rows[f"strength\n{strength:g}"] = row_of
    second = grids.compose_grid(list(rows.values()), list(rows), TURNED, 2)
    whole = Image.new("RGB", (max(first.width, second.width), first.height + second.height), "white")
    whole.paste(first, (0, 0))
    whole.paste(second, (0, first.height))
    return whole


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, help="run of the student; default: the embedded one")
    parser.add_argument("--count", type=int, default=None, help="prompts of the table of steps; default: all 512")
    parser.add_argument("--sets", type=int, default=3, help="repetitions of the table of strengths, with other seeds")
    parser.add_argument("--few", type=int, default=24, help="images in a repetition of the table of strengths")
    parser.add_argument("--teacher_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="of the teacher")
    parser.add_argument("--page", type=Path, default=Path("docs/steps.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/steps.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    student, judge, slow = Student(args.run), zoo.load_classifier(), load.load_teacher_pipeline(args.run)

    def teacher(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return tensor(
            generate.generate_images(
                slow, prompts, seeds, generate.Sampling(args.teacher_steps, args.guidance_scale, batch=64)
            ).images
        )

    grids.save_png(small(sheet(student, teacher, args.teacher_steps)), args.picture)
    note = f"± is the standard deviation over {args.sets} sets of seeds. {machine()}"
    strengths = strength_table(student, judge, args.sets, args.few)
    rewrite(args.page, "strengths", f"{strengths}\n\n{args.few} images in each set. {note}")
    images = args.count or zoo.prompts.EVAL_COUNT
    note = f"{images} images in each row, one set of seeds; ± as in `wadi eval` (of ms: half the distance of the quartiles)."
    rewrite(args.page, "steps", f"{steps_table(student, args)}\n\n{note} {machine()}")


if __name__ == "__main__":
    main()
