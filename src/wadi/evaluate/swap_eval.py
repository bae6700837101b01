"""Evaluate a student next to its hybrids with the teacher's norms or directions put back (Figures 1c and 1d).

If a hybrid is as good as the student, what was put back does not matter; if it is much worse, it does. Student and hybrids
generate for the same prompts and seeds, and are compared with the teacher's images from other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wadi.analysis import plots
from wadi.analysis.analyze import is_layer
from wadi.analysis.kinds import KINDS, kind
from wadi.analysis.sources import open_teacher
from wadi.backbones.digest import teacher_digest
from wadi.errors import WadiError
from wadi.evaluate import protocols
from wadi.evaluate.evaluation import Evaluation
from wadi.evaluate.generated import file_name
from wadi.evaluate.generators import Generator, Source, find
from wadi.evaluate.metric_table import Options
from wadi.evaluate.reference import teacher_reference
from wadi.evaluate.result import Result, Row
from wadi.evaluate.result_table import table
from wadi.io import grids
from wadi.io.files import sha256
from wadi.io.images import read_image
from wadi.io.metric_names import lower_is_better, metric_label
from wadi.pipelines.hybrid import load_any_student, load_hybrid
from wadi.zoo.paths import NAME as ZOO
from wadi.zoo.paths import resolve_teacher

SHOWN = 8  # columns of Figure 1d


@dataclass(frozen=True)
class SwapSettings:
    """How to evaluate the hybrids.

    Attributes:
        prompts: file of prompts; None = the zoo's own, for which the teacher must be zoo.
        count: number of prompts, from the start; None = all.
        metrics: names as in ``wadi eval``; None = fd-zoo and top1 for zoo, fd for other teachers.
        steps: steps of the teacher, whose images are the reference.
        guidance_scale: guidance of the teacher; None = 2.5, or none for a family that takes none.
        batch: images generated at once.
        folder: where the generated images are kept.
    """

    prompts: str | None = None
    count: int | None = None
    metrics: Sequence[str] | None = None
    steps: int = 25
    guidance_scale: float | None = None
    batch: int = 8
    folder: str | Path = "runs/eval"


@dataclass(frozen=True)
class SwapGenerators:
    """What generates: the student and its hybrids in all layers, and its hybrids in one kind of layer each."""

    complete: list[Generator]
    by_kind: list[Generator]


@dataclass(frozen=True)
class SwapResult:
    """The evaluation of a student and its hybrids.

    Attributes:
        result: a row per generator; the first ``complete`` rows are those of `SwapGenerators.complete`.
        prompts: some of the prompts.
        images: by generator, its image file for each of ``prompts``; first the teacher's, from another seed.
    """

    result: Result
    complete: int
    prompts: list[str]
    images: dict[str, list[Path]]


def swap_generators(teacher: str, student: str, by_kind: bool = False) -> SwapGenerators:
    """Return the student and its hybrids with ``teacher`` as generators; their weights are loaded when they generate.

    Args:
        teacher, student: as in `wadi.pipelines.hybrid.load_any_student`.
        by_kind: whether to put directions back in each kind of layer by itself, too.
    Raises:
        WadiError: if teacher or student cannot be loaded.
    """
    weights = open_teacher(teacher)
    plain = _plain_student(teacher, student)
    base = sha256(Path(teacher)) if Path(teacher).is_file() else teacher_digest(resolve_teacher(teacher))

    def hybrid(name: str, take: str, layers: str, matches: Callable[[str], bool]) -> Generator:
        about = {"kind": "hybrid", "student": plain.about, "teacher": base, "take": take, "layers": layers}
        return Generator(name, about, lambda: load_hybrid(teacher, student, weights, take, matches)[0])

    complete = [hybrid(f"teacher's {take}s, put back", take, "all", lambda _: True) for take in ("norm", "direction")]
    if not by_kind:
        return SwapGenerators([plain, *complete], [])
    layers = [name for name in weights if is_layer(weights, name)]
    kind_of = {name.removesuffix(".weight"): kind(name.removesuffix(".weight"), len(weights.shape(name))) for name in layers}
    names = {each: {name for name, its_kind in kind_of.items() if its_kind == each} for each in KINDS}
    parts = [hybrid(f"directions back in {k}", "direction", k, names[k].__contains__) for k in KINDS if names[k]]
    return SwapGenerators([plain, *complete], parts)


def _plain_student(teacher: str, student: str) -> Generator:
    place: dict[str, Any] = {} if teacher == ZOO else {"teacher": teacher}
    source = None if Path(student).is_file() else find(student, **place)
    if source is None:
        load_any_student(teacher, student)  # raises with the reason
        raise WadiError(f"Student {student!r} cannot generate images. Give a run, an adapter, a pipeline or zoo.")
    return replace(source.plain(), name="student")


def evaluate_swaps(teacher: str, generators: SwapGenerators, settings: SwapSettings, command: str = "") -> SwapResult:
    """Generate with the teacher, the student and its hybrids, and compute the metrics.

    Args:
        command: the command line, for the result file.
    Raises:
        WadiError: if the prompts cannot be read, or a metric is unknown or lacks its weights.
    """
    embedded = teacher == ZOO
    protocol = protocols.zoo(settings.count)
    if not embedded:
        if settings.prompts is None:
            raise WadiError(f"Teacher {teacher!r} has no prompts of its own. Give a file of prompts (--prompts FILE).")
        protocol = protocols.prompt_file(settings.prompts, None, settings.count)
    metrics = settings.metrics or (("fd-zoo", "top1") if embedded else ("fd",))
    source = Source(teacher) if embedded else Source(teacher, pipeline=True, teacher=teacher)
    many_steps = source.many_steps(settings.steps, source.guidance(settings.guidance_scale, 2.5))
    reference = teacher_reference(many_steps, protocol)
    evaluation = Evaluation(metrics, Options(), protocol, reference, settings.folder, batch=settings.batch)
    everything = [*generators.complete, *generators.by_kind]
    evaluation.generate(everything)
    rows = [evaluation.generated_row(generator) for generator in everything]
    count = len(protocol.prompts)
    shown = [i * count // SHOWN for i in range(SHOWN)] if count > SHOWN else range(count)
    folders = {many_steps.name: evaluation.folder / f"{many_steps.key}-set0"}
    folders |= {generator.name: evaluation.folder_of(generator) for generator in generators.complete}
    return SwapResult(
        evaluation.result(rows, command),
        len(generators.complete),
        [protocol.prompts[i] for i in shown],
        {name: [folder / file_name(i) for i in shown] for name, folder in folders.items()},
    )


def write_swaps(swaps: SwapResult, folder: Path) -> None:
    """Write Figures 1c and 1d and the result file into the folder of an analysis, and append tables to ``analysis.md``."""
    swaps.result.save(folder / "swap.json")
    complete, by_kind = swaps.result.rows[: swaps.complete], swaps.result.rows[swaps.complete :]
    titles = {name: _title(name) for name in complete[0].metrics}
    plots.bars(_bar_rows(complete), titles, folder)
    _write_images(swaps, folder / "figure-1d.png")
    lines = ["", "![Figure 1c](figure-1c.png)", "", table(complete), "", "![Figure 1d](figure-1d.png)"]
    if by_kind:
        first = next(iter(titles))
        plots.bars_across(_bar_rows(by_kind), _bar_rows(complete)[0], first, titles[first].replace("\n", " "), folder)
        lines += ["", "The teacher's directions put back in one kind of layer:", "", table(by_kind), ""]
        lines += ["![By kind](swap-by-kind.png)"]
    with open(folder / "analysis.md", "a", encoding="utf-8") as page:
        page.write("\n".join([*lines, "", f"Protocol hash `{swaps.result.hash}`.", ""]))


def _title(metric: str) -> str:
    better = "lower" if lower_is_better(metric) else "higher"
    return f"{metric_label(metric)}\n({better} is better)"


def _write_images(swaps: SwapResult, path: Path) -> None:
    rows = {name: [read_image(file) for file in files] for name, files in swaps.images.items()}
    labels = [name.replace(", ", "\n") for name in rows]
    scale = grids.enlargement(next(iter(rows.values()))[0])
    grids.save_png(grids.compose_grid(list(rows.values()), labels, swaps.prompts, scale), path)


def _bar_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows in the form that the bar figures take: values and spreads by metric."""
    return [
        {
            "name": row.name,
            **{name: number.value for name, number in row.metrics.items()},
            **{f"{name}_spread": number.std or 0.0 for name, number in row.metrics.items()},
        }
        for row in rows
    ]
