"""``wadi export``: write a student in the form that other programs read, and check it with their own reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli.family import add_family
from wadi.errors import WadiError
from wadi.exports import FORMATS
from wadi.io.bounds import RANK, Whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi export``."""
    add = parser.add_argument
    run = "folder of the run, or of an exported pipeline; default: the embedded student"
    add("source", nargs="?", default=None, help=run)
    add("--run", type=str, default=None, help="the same as the word without an option")
    add("--adapter", type=str, default=None, help="folder or Hub id of a student's adapter, in place of a run")
    teacher = "pipeline folder or Hub id that the student was made from; default: as trained"
    add("--teacher", type=str, default=None, help=teacher)
    add("--out", type=str, required=True, help="folder to write; it must not exist")
    *others, last = FORMATS
    add("--to", type=str, default="diffusers", help=f"format: {', '.join(others)} or {last} (docs/export.md)")
    dtype = "type of the weights: float32, bfloat16 or float16; with --to onnx or openvino: float32, float16 or int8"
    add("--dtype", type=str, default="float32", help=dtype)
    add("--device", type=str, default="cpu", help="where to compute: cpu, cuda, cuda:1, ...")
    rank = "with --to lora: rank of the LoRA; default: as trained, for students of other adapters 64"
    add("--rank", type=RANK, default=None, help=rank)
    add("--images", type=Whole(1, 64), default=4, help="number of images that check the export")
    prompts = "file with the prompts of these images; default: the sample prompts of the run"
    add("--prompts", type=str, default=None, help=prompts)
    base = "name of the teacher in the exported files, such as its Hub id; default: its Hub id, or the name of its folder"
    add("--base-name", type=str, default=None, help=base)
    hub = "also upload the export to this repository of the Hugging Face Hub, OWNER/NAME; creates it if there is none"
    add("--push-to-hub", type=str, default=None, help=hub)
    add("--private", action="store_true", help="with --push-to-hub: create the repository as a private one")
    add("--licence", type=str, default=None, help="licence of the teacher for the card; default: what the teacher's card says")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Write the export, and print how to load it and how it differs from the student."""
    import torch

    from wadi.exports.hub import check_can_push, push
    from wadi.exports.runtime_folder import precision_of
    from wadi.exports.source import Source
    from wadi.exports.write import Settings, export
    from wadi.parallel.device import dtype_of, find_device

    options = arguments.options
    if options.run is not None and options.source is not None:
        raise WadiError(f"{options.source!r} and --run {options.run!r} were given. Give one of them.")
    if options.rank is not None and options.to != "lora":
        raise WadiError(f"--rank {options.rank} was given with --to {options.to}. It needs --to lora.")
    to_runtime = options.to in ("onnx", "openvino")
    settings = Settings(options.rank, precision_of(options.dtype) if to_runtime else "float32")
    if options.private and options.push_to_hub is None:
        raise WadiError("--private was given without --push-to-hub. Give both or neither.")
    if options.push_to_hub is not None:
        check_can_push(options.push_to_hub)
    source = Source(
        options.source if options.run is None else options.run,
        options.adapter,
        options.teacher,
        torch.float32 if to_runtime else dtype_of(options.dtype),
        find_device(options.device),
        options.prompts,
        options.images,
        options.base_name,
        options.licence,
    )
    exported = export(source, options.to, Path(options.out), settings)
    print(f"{options.out}: {exported.summary}")
    print(f"Read back: {exported.check}.")
    if options.push_to_hub is not None:
        print(f"Uploaded: {push(Path(options.out), options.push_to_hub, options.private)}")
    return 0
