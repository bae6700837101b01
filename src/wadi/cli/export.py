"""``wadi export``: write a pipeline or LoRA files that load without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments

FORMATS = ("diffusers", "lora")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi export``."""
    add = parser.add_argument
    add("--run", type=str, default=None, help="folder of the run whose student is exported; default: the embedded student")
    add("--adapter", type=str, default=None, help="folder of a student's adapter, in place of --run")
    add(
        "--teacher",
        type=str,
        default=None,
        help="pipeline folder or Hub id that the adapter is merged into; default: as trained",
    )
    add("--out", type=str, required=True, help="folder to write; it must not exist")
    add(
        "--to",
        type=str,
        default="diffusers",
        help="format: diffusers (a merged pipeline) or lora (files of a student trained as lora or dora; ignores --dtype)",
    )
    add("--dtype", type=str, default="float32", help="type of the weights: float32, bfloat16 or float16")
    add("--device", type=str, default="cpu", help="where to merge the adapter: cpu, cuda, cuda:1, ...")


def run(arguments: Arguments) -> int:
    """Merge the adapter into the teacher's weights and save the pipeline, or write the adapter as LoRA files."""
    from wadi.backbones.saving import loading_line, save_pipeline
    from wadi.cli.generate import load_student
    from wadi.io.outputs import check_out

    out = Path(arguments.options.out)
    if arguments.options.to not in FORMATS:
        raise WadiError(f"--to is {arguments.options.to!r}. Choose one of {', '.join(FORMATS)}.")
    check_out(out)
    if arguments.options.to == "lora":
        return _export_lora(arguments.options, out)
    pipeline = load_student(arguments.options)
    save_pipeline(pipeline, out)
    print(f"{out}: {loading_line(pipeline, out)}")
    return 0


def _export_lora(options: Any, out: Path) -> int:
    """Write LoRA files, and print where the lines are that load them."""
    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.convert.lora_files import read_loras, write_lora_files
    from wadi.diffusion.schedulers import student_scheduler
    from wadi.pipelines.load import locate_adapter, read_student

    folder, base = locate_adapter(options.run, options.adapter, options.teacher)
    loras, about = read_loras(folder), read_student(folder)
    backbone = from_pipeline(load_pipeline(base), about.resolution)
    scheduler = student_scheduler(backbone.pipeline.scheduler, about.timesteps)
    write_lora_files(backbone, loras, scheduler, len(about.timesteps), out)
    print(f"{out}: LoRA of {len(loras)} layers; {out / 'README.md'} has the lines that load it")
    return 0
