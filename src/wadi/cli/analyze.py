"""``wadi analyze`` and ``wadi swap``: what distillation changed in the weights, and hybrids that tell which of it matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, SIDE, STEPS
from wadi.zoo.paths import NAME as ZOO
from wadi.zoo.paths import resolve_teacher

if TYPE_CHECKING:
    from wadi.evaluate.generators import Generator
    from wadi.evaluate.result import Result, Row

TEACHER = "pipeline folder, Hub id, .safetensors state dict of the network, or zoo"
SHOWN = 8  # columns of the grid


def analyze(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """``wadi analyze``; ``parse`` and ``make_parser`` are the command line's own."""
    parser = make_parser("analyze")
    parser.add_argument("teacher", help=TEACHER)
    parser.add_argument("student", help="a run, an adapter folder, or as the teacher; zoo is the embedded student")
    parser.add_argument("--out", type=str, required=True, help="folder to write; a run's analysis/ goes into its report")
    parser.add_argument("--exact_up_to", type=SIDE, default=4096, help="side of a layer up to which its spectrum is exact")
    parser.add_argument("--device", type=str, default="cpu", help="where a layer is computed")
    parser.add_argument("--swap_eval", action="store_true", help="measure the student and its hybrids (Figure 1c, 1d)")
    add = parser.add_argument
    add("--by_kind", action="store_true", help="with --swap_eval: also directions put back kind by kind")
    add("--prompts", type=str, default=None, help="with --swap_eval: file of prompts; zoo has its own")
    add("--count", type=COUNT, default=None, help="with --swap_eval: number of prompts, from the start; default: all")
    add("--metrics", type=str, default=None, help="with --swap_eval: as of wadi eval; default: fd-zoo,top1 for zoo, else fd")
    add("--steps", type=STEPS, default=None, help="with --swap_eval: steps of the teacher, the reference; default: 25")
    add("--guidance_scale", type=GUIDANCE, default=None, help="with --swap_eval: of the teacher; default: 2.5; FLUX 1 (none)")
    add("--draw_batch", type=BATCH, default=None, help="with --swap_eval: images generated at once; default: 8")
    add("--pictures", type=str, default=None, help="with --swap_eval: folder of the generated images; default: runs/eval")
    parser.add_argument("--page", type=str, default=None, help="Markdown file: tables and figures between its markers")
    args = parse(parser, [word.replace("--swap-eval", "--swap_eval") for word in argv])
    _refuse_ignored(args)
    from wadi.analysis import write
    from wadi.analysis.analyze import analyze as compare
    from wadi.io.files import whole_folder
    from wadi.io.markdown import split_at_markers
    from wadi.io.outputs import check_replaceable
    from wadi.io.regular import read_text
    from wadi.parallel.device import find_device

    out = Path(args.out)
    check_replaceable(out, write.KNOWN)
    if args.page is not None:
        split_at_markers(Path(args.page), write.BEGIN, write.END)  # complain before all the work
    if args.swap_eval and args.teacher != ZOO and args.prompts is None:
        raise WadiError("--swap_eval draws pictures of prompts. Expected --prompts FILE (zoo alone has prompts of its own).")
    generators = _generators(args) if args.swap_eval else None
    found = compare(args.teacher, args.student, args.exact_up_to, find_device(args.device))
    hybrids = swap_eval(args, argv, *generators) if generators else None
    with whole_folder(out, write.KNOWN) as folder:
        write.write(found, folder)
        if hybrids is not None:
            _write_hybrids(hybrids, folder)
    if args.page is not None:
        write.write_page(Path(args.page), out, "wadi analyze " + " ".join(argv))
    print(read_text(out / "analysis.md"))
    print(f"analysis  {out}")
    return 0


# Options of --swap_eval, with the values that they have unless given.
OF_SWAP_EVAL = {
    "by_kind": False, "prompts": None, "count": None, "metrics": None, "steps": 25, "guidance_scale": None, "draw_batch": 8,
    "pictures": "runs/eval",
}  # fmt: skip


def _refuse_ignored(args: Any) -> None:
    """Raise `WadiError` for options that would have no effect; fill in the defaults of the others."""
    for name, default in OF_SWAP_EVAL.items():
        if getattr(args, name) in (None, False):
            setattr(args, name, default)
        elif not args.swap_eval:
            raise WadiError(f"--{name} was given without --swap_eval, which alone uses it. Add --swap_eval or leave it out.")
    if args.prompts is not None and args.teacher == ZOO:
        raise WadiError(f"--prompts is {args.prompts!r}, and zoo is measured on prompts of its own. Leave out --prompts.")


def swap(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """``wadi swap``."""
    parser = make_parser("swap")
    parser.add_argument("teacher", help=TEACHER)
    parser.add_argument("student", help="a run, an adapter folder, an exported or other pipeline, or zoo")
    parser.add_argument("--take", type=str, required=True, help="what the teacher gives: norm or direction")
    parser.add_argument("--layers", type=str, default=".*", help="regular expression over whole names of layers")
    parser.add_argument("--out", type=str, required=True, help="pipeline folder to write; must not exist")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")
    args = parse(parser, argv)
    from wadi.analysis.sources import open_teacher
    from wadi.analysis.swap import matching
    from wadi.backbones.saving import loading_line, save_pipeline
    from wadi.io.outputs import check_out

    out, chosen = Path(args.out), matching(args.layers)
    check_out(out)
    pipeline, changed = hybrid(args.teacher, args.student, args.take, chosen, args.dtype, open_teacher(args.teacher))
    save_pipeline(pipeline, out)
    print(f"{len(changed)} layers with the teacher's {args.take}s\n{out}: {loading_line(pipeline, out)}")
    return 0


# --- hybrids ----------------------------------------------------------------------------------------------------------------


def load_student(teacher: str, student: str, dtype: str = "float32") -> Any:
    """The student's own pipeline, with its one-step scheduler.

    Raises:
        WadiError: if it is a bare state dict, which has no scheduler, or cannot be loaded.
    """
    import torch

    from wadi.analysis.sources import adapter_folder
    from wadi.backbones import load_pipeline
    from wadi.pipelines.generate import load

    if dtype not in ("float32", "bfloat16", "float16"):
        raise WadiError(f"--dtype is {dtype!r}. Expected float32, bfloat16 or float16.")
    folder = adapter_folder(student)
    if folder is not None:
        base = None if Path(teacher).is_file() else teacher  # weights alone make no pipeline: the one that the adapter names
        return load(adapter=folder, teacher=base, dtype=getattr(torch, dtype))
    if Path(student).is_file():
        raise WadiError(
            f"Student {student!r} is a state dict, which has no scheduler to draw in one step with. Expected a pipeline, a run "
            "or an adapter: put it into a pipeline first (wadi import-authors, wadi extract)."
        )
    return load_pipeline(student, getattr(torch, dtype))


def hybrid(
    teacher: str, student: str, take: str, chosen: Callable[[str], bool], dtype: str, weights: Any
) -> tuple[Any, list[str]]:
    """The student's pipeline with the teacher's norms or directions put back, and the names of the layers changed."""
    from wadi.analysis.swap import put_back
    from wadi.backbones import from_pipeline

    pipeline = load_student(teacher, student, dtype)
    return pipeline, put_back(from_pipeline(pipeline).network, weights, take, chosen)


def _generators(args: Any) -> tuple[list[Generator], list[Generator]]:
    """The student with its two whole hybrids, and those with the teacher's directions in one kind of layer."""
    from wadi.analysis.analyze import is_layer
    from wadi.analysis.kinds import KINDS, kind
    from wadi.analysis.sources import open_teacher
    from wadi.backbones.digest import teacher_digest
    from wadi.evaluate.generators import Generator, find
    from wadi.io.files import sha256

    weights = open_teacher(args.teacher)
    source = (
        None
        if Path(args.student).is_file()
        else find(args.student, **({} if args.teacher == ZOO else {"teacher": args.teacher}))
    )
    if source is None:
        load_student(args.teacher, args.student)  # says what is wrong with it
        raise WadiError(f"Student {args.student!r} cannot draw. Expected a run, an adapter, a pipeline or zoo.")
    student = replace(source.plain(), name="student")
    base = sha256(Path(args.teacher)) if Path(args.teacher).is_file() else teacher_digest(resolve_teacher(args.teacher))

    def put(name: str, take: str, of: str, chosen: Callable[[str], bool]) -> Generator:
        about = {"kind": "hybrid", "student": student.about, "teacher": base, "take": take, "layers": of}
        return Generator(name, about, lambda: hybrid(args.teacher, args.student, take, chosen, "float32", weights)[0])

    whole = [put(f"teacher's {take}s, put back", take, "all", lambda _: True) for take in ("norm", "direction")]
    kinds = {name: kind(name.removesuffix(".weight"), len(weights.shape(name))) for name in weights if is_layer(weights, name)}
    parts = {of: {name.removesuffix(".weight") for name, found in kinds.items() if found == of} for of in KINDS}
    partial = [put(f"directions back in {of}", "direction", of, names.__contains__) for of, names in parts.items() if names]
    return [student, *whole], partial if args.by_kind else []


def swap_eval(args: Any, argv: Sequence[str], generators: list[Generator], partial: list[Generator]) -> Hybrids:
    """Draw the student and its hybrids for the same prompts and seeds, and measure them against the teacher's pictures.

    Raises:
        WadiError: what `wadi eval` would raise.
    """
    import shlex

    from wadi.evaluate import protocols
    from wadi.evaluate.drawn import file_name
    from wadi.evaluate.generators import Source
    from wadi.evaluate.run import Evaluation, of_teacher
    from wadi.evaluate.score import Options

    protocol = protocols.zoo(args.count) if args.teacher == ZOO else protocols.prompt_file(args.prompts, None, args.count)
    metrics = (args.metrics or ("fd-zoo,top1" if args.teacher == ZOO else "fd")).split(",")
    place: dict[str, Any] = {} if args.teacher == ZOO else {"pipeline": True, "teacher": args.teacher}
    source = Source(args.teacher, **place)
    teacher = source.many_steps(args.steps, source.guidance(args.guidance_scale, 2.5))
    reference = of_teacher(teacher, protocol)
    evaluation = Evaluation(metrics, Options(), protocol, reference, args.pictures, draw_batch=args.draw_batch)
    evaluation.draw([*generators, *partial])
    rows = [evaluation.drawn_row(generator) for generator in (*generators, *partial)]
    shown = (
        [i * len(protocol.prompts) // SHOWN for i in range(SHOWN)]
        if len(protocol.prompts) > SHOWN
        else range(len(protocol.prompts))
    )
    folders = {teacher.name: evaluation.pictures / f"{teacher.key}-set0", **{g.name: evaluation.folder(g) for g in generators}}
    return Hybrids(
        evaluation.result(rows, shlex.join(["wadi", "analyze", *argv])),
        len(generators),
        [protocol.prompts[i] for i in shown],
        {name: [folder / file_name(i) for i in shown] for name, folder in folders.items()},
    )


@dataclass(frozen=True)
class Hybrids:
    """What `swap_eval` found: the first ``whole`` rows of the result are the student and its two whole hybrids.

    ``pictures``: files by generator, the teacher's from other noise, one for each of ``prompts``.
    """

    result: Result
    whole: int
    prompts: list[str]
    pictures: dict[str, list[Path]]


LOWER = ("fid", "kid", "fd", "kd")  # is better


def _write_hybrids(found: Hybrids, folder: Path) -> None:
    """Figures 1c and 1d, the scores as a result file, and their tables at the end of ``analysis.md``."""
    from wadi.analysis import plots
    from wadi.evaluate.result import table
    from wadi.io import grids
    from wadi.io.images import read_image
    from wadi.io.metric_names import metric_label
    from wadi.pipelines.generate import enlargement

    found.result.save(folder / "swap.json")
    whole, partial = found.result.rows[: found.whole], found.result.rows[found.whole :]
    titles = {
        name: f"{metric_label(name)}\n({'lower' if name.split()[0].split('-')[0] in LOWER else 'higher'} is better)"
        for name in whole[0].metrics
    }
    plots.bars(_scores(whole), titles, folder)
    rows = {name: [read_image(path) for path in paths] for name, paths in found.pictures.items()}
    labels = [name.replace(", ", "\n") for name in rows]
    grid = grids.compose_grid(list(rows.values()), labels, found.prompts, enlargement(next(iter(rows.values()))[0]))
    grids.save_png(grid, folder / "figure-1d.png")
    told = ["", "![Figure 1c](figure-1c.png)", "", table(whole), "", "![Figure 1d](figure-1d.png)"]
    if partial:
        first = next(iter(titles))
        plots.bars_across(_scores(partial), _scores(whole)[0], first, titles[first].replace("\n", " "), folder)
        told += [
            "",
            "The teacher's directions put back in one kind of layer:",
            "",
            table(partial),
            "",
            "![By kind](swap-by-kind.png)",
        ]
    with open(folder / "analysis.md", "a", encoding="utf-8") as page:
        page.write("\n".join([*told, "", f"Protocol hash `{found.result.hash}`.", ""]))


def _scores(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of a result as the figures take them."""
    return [
        {
            "name": row.name,
            **{k: n.value for k, n in row.metrics.items()},
            **{f"{k}_spread": n.std or 0.0 for k, n in row.metrics.items()},
        }
        for row in rows
    ]
