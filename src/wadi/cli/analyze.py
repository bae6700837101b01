"""``wadi analyze``: report what distillation changed in the weights, and evaluate hybrids of teacher and student."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.family import add_family
from wadi.cli.parser import flag
from wadi.errors import WadiError
from wadi.io.bounds import BATCH, COUNT, GUIDANCE, SIDE, STEPS
from wadi.zoo.paths import NAME as ZOO

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments
    from wadi.evaluate.swap_eval import SwapGenerators, SwapResult

TEACHER = "pipeline folder, Hub id, .safetensors state dict of the network, or zoo"
OF_SWAP_EVAL = ("by_kind", "prompts", "count", "metrics", "steps", "guidance_scale", "draw_batch", "pictures")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi analyze``."""
    add = parser.add_argument
    add("teacher", help=TEACHER)
    add("student", help="a run, an adapter folder, or as the teacher; zoo is the embedded student")
    add("--out", type=str, required=True, help="folder to write; the analysis/ folder of a run is shown in its report")
    add("--exact-up-to", type=SIDE, default=4096, help="compute the spectrum of a layer exactly up to this side length")
    add("--device", type=str, default="cpu", help="where the layers are computed: cpu, cuda, cuda:1, ...")
    add("--page", type=str, default=None, help="Markdown file: tables and figures go between its markers")
    add = parser.add_argument_group("evaluation of hybrids").add_argument
    add("--swap-eval", action="store_true", help="evaluate images of the student and its hybrids (Figures 1c, 1d)")
    add("--by-kind", action="store_true", help="also put directions back in one kind of layer at a time")
    add("--prompts", type=str, default=None, help="file of prompts; zoo has its own")
    add("--count", type=COUNT, default=None, help="number of prompts, from the start; default: all")
    add("--metrics", type=str, default=None, help="comma-separated, as in wadi eval; default: fd-zoo,top1 for zoo, else fd")
    add("--steps", type=STEPS, default=None, help="steps of the teacher, whose images are the reference; default: 25")
    add("--guidance-scale", type=GUIDANCE, default=None, help="guidance of the teacher; default: 2.5, for FLUX 1 (none)")
    add("--draw-batch", type=BATCH, default=None, help="images generated at once; default: 8")
    add("--pictures", type=str, default=None, help="folder in which generated images are kept; default: runs/eval")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Write the analysis, print its tables, and put them into ``--page``."""
    from wadi.analysis import write
    from wadi.analysis.analyze import analyze
    from wadi.io.files import whole_folder
    from wadi.io.markdown import split_at_markers
    from wadi.io.outputs import check_replaceable
    from wadi.io.regular import read_text
    from wadi.parallel.device import find_device

    options = arguments.options
    _check_options(options)
    command = ["wadi", "analyze", *arguments.words]
    out = Path(options.out)
    check_replaceable(out, write.KNOWN)
    if options.page is not None:
        split_at_markers(Path(options.page), write.BEGIN, write.END)  # report a page without markers before the work
    generators = _swap_generators(options) if options.swap_eval else None  # report a wrong student before the work
    analysis = analyze(options.teacher, options.student, options.exact_up_to, find_device(options.device))
    swaps = _evaluate_swaps(options, generators, shlex.join(command)) if generators is not None else None
    with whole_folder(out, write.KNOWN) as folder:
        write.write(analysis, folder)
        if swaps is not None:
            from wadi.evaluate.swap_eval import write_swaps

            write_swaps(swaps, folder)
    if options.page is not None:
        write.write_page(Path(options.page), out, " ".join(command))
    print(read_text(out / "analysis.md"))
    print(f"analysis  {out}")
    return 0


def _check_options(options: Any) -> None:
    """Raise `WadiError` for options that would have no effect, and for missing prompts."""
    for name in OF_SWAP_EVAL:
        if getattr(options, name) not in (None, False) and not options.swap_eval:
            raise WadiError(f"{flag(name)} has no effect without --swap-eval. Add --swap-eval, or leave out {flag(name)}.")
    if options.prompts is not None and options.teacher == ZOO:
        raise WadiError(f"--prompts is {options.prompts!r}, but zoo is evaluated on its own prompts. Leave out --prompts.")
    if options.swap_eval and options.teacher != ZOO and options.prompts is None:
        raise WadiError(f"--swap-eval needs prompts to generate from. Give --prompts FILE; only the teacher {ZOO} has its own.")


def _swap_generators(options: Any) -> SwapGenerators:
    from wadi.evaluate.swap_eval import swap_generators

    return swap_generators(options.teacher, options.student, options.by_kind)


def _evaluate_swaps(options: Any, generators: SwapGenerators, command: str) -> SwapResult:
    from wadi.evaluate.swap_eval import SwapSettings, evaluate_swaps

    given = {
        "prompts": options.prompts, "count": options.count, "steps": options.steps, "batch": options.draw_batch,
        "guidance_scale": options.guidance_scale, "folder": options.pictures,
        "metrics": options.metrics.split(",") if options.metrics else None,
    }  # fmt: skip
    settings = SwapSettings(**{name: value for name, value in given.items() if value is not None})
    return evaluate_swaps(options.teacher, generators, settings, command)
