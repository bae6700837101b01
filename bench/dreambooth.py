"""Compare DreamBooth on the embedded models: LoRaD and LoRA, on the teacher, its student, and both.

    python bench/dreambooth.py                      # trains what is missing, measures, writes table, JSON and picture
    python bench/dreambooth.py --sweep              # learning rates, on the first subject

Every training is the command `wadi dreambooth`. Its result stays in --work and is not computed again. With another shipped
student only the rows of the student are. There are three subjects (examples/subject), with --seeds trainings of each.

    subject      mean cosine similarity of generated images and the subject's own images, in the features of the zoo's
                 classifier (which was not trained on these icons)
    background   share of images of "sks X, on a C background" whose border is closer to C than to nine other colours
    elsewhere    share of images of other captions that the classifier names correctly
    sharpness    mean absolute Laplacian of those, divided by that of the same model before training
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from machine import machine
from wadi.backbones import load_pipeline
from wadi.cli.main import main as wadi
from wadi.distill.presets import ZOO_PROMPTS
from wadi.extras.dreambooth.subject import read_subject
from wadi.extras.lora.apply import apply_lora
from wadi.io import grids
from wadi.pipelines.generate import Sampling, generate_images
from wadi.pipelines.load import load
from wadi.zoo import COLOURS, caption, eval_prompts, load_classifier
from wadi.zoo.paths import embedded_path

SUBJECTS = {
    "green-apple": ("sks apple", "red apple"),
    "teddy-bear": ("sks panda", "panda"),
    "alarm-clock": ("sks watch", "watch"),
}
STEPS, GUIDANCE = 25, 2.5  # of the teacher, for its time and the image grid
JUDGED_STEPS = 10  # of the teacher, for the metrics, which take most of the time
PLAIN = 4  # images of the prompt without a background; ten more name one
ELSEWHERE = {"teacher": 12, "student": 106}
# name of a training: options of the command
TRAININGS = {
    "teacher-lorad": ["--teacher=zoo", "--method=lorad"],
    "teacher-lora": ["--teacher=zoo", "--method=lora"],
    "teacher-full": ["--teacher=zoo", "--method=full"],
    "teacher-lorad-wide": ["--teacher=zoo", "--method=lorad", "--prior_count=32", "--prior_prompt", *ZOO_PROMPTS],
    "student-lorad": ["--student=zoo", "--method=lorad"],
    "student-lora": ["--student=zoo", "--method=lora"],
    "student-lora-diffusion": ["--student=zoo", "--method=lora", "--loss=diffusion"],
}


@dataclass(frozen=True)
class Row:
    """A generator to evaluate: the model, the training it takes, and how the result is applied."""

    label: str
    model: str  # teacher or student
    training: str | None = None
    way: str = "plain"


ROWS = (
    Row("teacher, before", "teacher"),
    Row("teacher, LoRaD", "teacher", "teacher-lorad"),
    Row("teacher, LoRA", "teacher", "teacher-lora"),
    Row("student, before", "student"),
    Row("student, teacher's LoRaD (angles add)", "student", "teacher-lorad"),
    Row("student, teacher's LoRA added", "student", "teacher-lora"),
    Row("student, teacher's LoRA turned along", "student", "teacher-lora", "turned"),
    Row("student, LoRaD trained through its step", "student", "student-lorad"),
    Row("student, LoRA trained through its step", "student", "student-lora"),
    Row("student, LoRA trained by the diffusion loss", "student", "student-lora-diffusion"),
)
MORE = (
    Row("teacher, LoRaD, wider prior", "teacher", "teacher-lorad-wide"),
    Row("student, teacher's LoRaD, wider prior", "student", "teacher-lorad-wide"),
    Row("teacher, full weights", "teacher", "teacher-full", "pipeline"),
    Row("student's angles on the teacher's full weights", "student", "teacher-full", "pipeline"),
)


# --- trainings --------------------------------------------------------------------------------------------------------------


def training_folder(work: Path, name: str, subject: str, seed: int, options: Sequence[str] = ()) -> Path:
    """Return the folder of a training. Train first if it is missing."""
    prompt, prior = SUBJECTS[subject]
    student = student_digest() if name.startswith("student") else ""
    out = work / "-".join(filter(None, [subject, name, str(seed), student, *(o.strip("-").replace("=", "") for o in options)]))
    if not out.is_dir():
        common = [f"--subject=examples/subject/{subject}", f"--prompt={prompt}", f"--out={out}", f"--seed={seed}"]
        cheap = ["--prior_count=16", "--prior_steps=10", "--steps=100", "--picture=false"]
        code = wadi(["dreambooth", "--prior_prompt", prior, *common, *cheap, *TRAININGS[name], *options])
        if code:
            raise SystemExit(code)
    return out


def student_digest() -> str:
    """Return a digest of the shipped student's weights."""
    return hashlib.sha256((embedded_path("student") / "adapter_model.safetensors").read_bytes()).hexdigest()[:8]


def pipeline_of(row: Row, folder: Path | None) -> Any:
    """Return the pipeline of a row."""
    if row.way == "pipeline":
        return load_pipeline(str(folder)) if row.model == "teacher" else load(adapter=embedded_path("student"), teacher=folder)
    pipeline = load_pipeline(embedded_path("teacher")) if row.model == "teacher" else load()
    if folder is not None:
        apply_lora(pipeline, folder, student=embedded_path("student") if row.way == "turned" else None)
    return pipeline


# --- metrics ----------------------------------------------------------------------------------------------------------------


def generate(pipeline: Any, model: str, prompts: Sequence[str], seed: int, steps: int = JUDGED_STEPS) -> Tensor:
    """Generate images ``(N, 3, 64, 64)`` in [0, 1]; ``steps`` are those of a teacher."""
    steps, guidance = (steps, GUIDANCE) if model == "teacher" else (1, None)
    drawn = generate_images(pipeline, prompts, range(seed, seed + len(prompts)), Sampling(steps, guidance, batch=32)).images
    return (
        torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(64, 64, 3) for p in drawn]).permute(
            0, 3, 1, 2
        )
        / 255
    )


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarity of every row of ``a`` with every row of ``b``."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def border_colour(image: Tensor) -> str:
    """Return the name of the colour nearest to the median of the outermost two pixels."""
    frame = torch.ones(64, 64, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    rgb = image[:, frame].median(1).values
    names = list(COLOURS)
    return names[int((torch.tensor([COLOURS[name] for name in names]) / 255 - rgb).norm(dim=1).argmin())]


def laplacian(images: Tensor) -> float:
    """Return the mean absolute Laplacian of the images in grey. Blur lowers it."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(images.mean(1, keepdim=True), kernel).abs().mean())


@torch.no_grad()
def measure(pipeline: Any, model: str, subject: str, seed: int, judge: Any) -> dict[str, float]:
    """Return the four metrics. The noise is the same for every row of one subject and seed."""
    prompt, _ = SUBJECTS[subject]
    own, _ = read_subject(Path("examples/subject") / subject, (64, 64))
    colours = [*[None] * PLAIN, *COLOURS]
    images = generate(pipeline, model, [caption(prompt, None, colour) for colour in colours], 1000 + 100 * seed)
    obeyed = [border_colour(image) == colour for image, colour in zip(images, colours, strict=True) if colour]
    rows = eval_prompts()[: ELSEWHERE[model]]
    others = generate(pipeline, model, [text for text, _, _ in rows], 5000)
    return {
        "subject": float(similarity(judge.features(images), judge.features(own)).mean()),
        "background": sum(obeyed) / len(obeyed),
        "elsewhere": judge.top1(others, [concept for _, concept, _ in rows]),
        "laplacian": laplacian(others),
    }


def ceiling(judge: Any) -> float:
    """Return the mean similarity of each image of a subject with the other four."""
    means = []
    for subject in SUBJECTS:
        own, _ = read_subject(Path("examples/subject") / subject, (64, 64))
        with torch.no_grad():
            same = similarity(judge.features(own), judge.features(own))
        means.append(float((same.sum() - len(own)) / (len(own) * (len(own) - 1))))
    return statistics.fmean(means)


def cached_metrics(row: Row, subject: str, seed: int, work: Path, judge: Any) -> dict[str, float]:
    """Return the metrics of a row, from the file in --work if they were computed before."""
    folder = training_folder(work, row.training, subject, seed) if row.training else None
    student = f"-{student_digest()}" if row.model == "student" else ""
    file = work / "measures" / f"{subject}-{seed}-{row.model}-{row.training}-{row.way}{student}.json"
    if not file.is_file():
        metrics = measure(pipeline_of(row, folder), row.model, subject, seed, judge)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics))
    return json.loads(file.read_text())


def collect(rows: Sequence[Row], work: Path, seeds: int, other_seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return the metrics of ``rows`` by label, over subjects and seeds; sharpness relative to the model before training."""
    judge, table = load_classifier(), {}
    for row in rows:
        columns: dict[str, list[float]] = {"subject": [], "background": [], "elsewhere": [], "sharpness": []}
        for subject in SUBJECTS:
            for seed in range(seeds if row.training in ("teacher-lorad", "teacher-lora") else other_seeds):
                metrics = cached_metrics(row, subject, seed, work, judge)
                before = cached_metrics(Row("", row.model), subject, 0, work, judge)  # its captions and noise are the same
                metrics["sharpness"] = metrics["laplacian"] / before["laplacian"]
                for name, values in columns.items():
                    values.append(metrics[name])
        table[row.label] = columns
        print(line(row.label, columns), flush=True)
    return table


# --- results ----------------------------------------------------------------------------------------------------------------


def line(label: str, columns: dict[str, list[float]]) -> str:
    """Return a row of the table: mean and standard deviation over subjects and seeds."""
    cells = [f"{statistics.fmean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else 0:.3f}" for v in columns.values()]
    return f"| {label} | {' | '.join(cells)} | {len(columns['subject'])} |"


HEAD = """| | subject | background | elsewhere | sharpness | trainings |
|---|---|---|---|---|---|"""


MARKS = ("<!-- measured -->", "<!-- /measured -->")


def latency(model: str, count: int) -> float:
    """Return the median time of one image, in milliseconds, with decoding."""
    pipeline, times = pipeline_of(Row("", model), None), []
    steps, guidance = (STEPS, GUIDANCE) if model == "teacher" else (1, None)
    generate_images(pipeline, ["red apple"], [0], Sampling(1))
    for seed in range(count):
        start = time.perf_counter()
        generate_images(pipeline, ["red apple"], [seed], Sampling(steps, guidance))
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def write_grid(work: Path, path: Path) -> None:
    """Write a grid of images: each row of the table on the three subjects, plain and on purple, and on another caption."""
    prompts = [text for prompt, _ in SUBJECTS.values() for text in (prompt, caption(prompt, None, "purple"))]
    other = "pizza, noto style, on a blue background"
    own = [read_subject(Path("examples/subject") / subject, (64, 64))[1][0] for subject in SUBJECTS]
    rows, labels = [[cell for one in own for cell in (one, grids.to_pil(torch.ones(3, 64, 64)))]], ["one of five\npictures"]
    for row in ROWS:
        cells = []
        for subject, (prompt, _) in SUBJECTS.items():
            pipeline = pipeline_of(row, training_folder(work, row.training, subject, 0) if row.training else None)
            texts = [prompt, caption(prompt, None, "purple")] + ([other] if subject == list(SUBJECTS)[-1] else [])
            cells += [grids.to_pil(p) for p in generate(pipeline, row.model, texts, 7, STEPS)]
        rows.append(cells)
        labels.append(
            row.label.replace(", ", ",\n", 1)
            .replace(" trained by the", " trained\nby the")
            .replace(" trained thr", " trained\nthr")
        )
    grids.save_png(grids.compose_grid(rows, labels, [*prompts, other]), path)


def sweep(work: Path, rates: Sequence[float], names: Sequence[str], steps: int) -> None:
    """Try learning rates, with one seed of the first subject."""
    judge, subject = load_classifier(), next(iter(SUBJECTS))
    print(HEAD)
    for name in names:
        for rate in rates:
            folder = training_folder(work / "sweep", name, subject, 0, [f"--lr={rate}", f"--steps={steps}"])
            model = name.split("-")[0]
            for shown in dict.fromkeys((model, "student")):
                row = Row(f"{name} lr {rate} on {shown}", shown, name, "pipeline" if name.endswith("full") else "plain")
                metrics = measure(pipeline_of(row, folder), shown, subject, 0, judge)
                print(line(row.label, {k: [v] for k, v in metrics.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/dreambooth"))
    parser.add_argument("--seeds", type=int, default=2, help="trainings of LoRaD and LoRA on the teacher, per subject")
    parser.add_argument("--other_seeds", type=int, default=1, help="trainings of the other kinds, per subject")
    parser.add_argument("--json", type=Path, default=Path("bench/results/dreambooth.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/dreambooth.png"))
    parser.add_argument("--page", type=Path, default=Path("docs/dreambooth.md"))
    parser.add_argument("--fresh", action="store_true", help="delete --work first, and train everything again")
    parser.add_argument("--sweep", nargs="*", type=float, default=None, help="try these learning rates instead")
    parser.add_argument("--sweep_names", nargs="+", default=["teacher-lorad", "teacher-lora"])
    parser.add_argument("--sweep_steps", type=int, default=120)
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    if args.sweep is not None:
        sweep(args.work, args.sweep, args.sweep_names, args.sweep_steps)
        return
    print(f"ceiling, the subjects' own pictures: {ceiling(load_classifier()):.3f}\n{HEAD}")
    table = {}
    for rows in (ROWS, MORE):
        table |= collect(rows, args.work, args.seeds, args.other_seeds)
        report(table, args)


def report(table: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the JSON file, the table between the marks of the page, and the grid of images."""
    slow, fast = latency("teacher", 5), latency("student", 20)
    about = {"machine": machine(), "student": student_digest(), "teacher_ms": slow, "student_ms": fast}
    about["ceiling"] = ceiling(load_classifier())
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
    lines = [
        HEAD,
        f"| *the subjects' own pictures, each with the others* | {about['ceiling']:.3f} | | | | |",
        *(line(label, columns) for label, columns in table.items()),
        "",
        f"One picture: teacher in {STEPS} steps {slow:.0f} ms, student in one {fast:.0f} ms, {slow / fast:.1f} times as fast "
        f"({1 - fast / slow:.0%} less time). {machine()}. Student {student_digest()}.",
    ]
    before, mark, rest = args.page.read_text().partition(MARKS[0])
    args.page.write_text(f"{before}{mark}\n" + "\n".join(lines) + f"\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    write_grid(args.work, args.picture)


if __name__ == "__main__":
    main()
