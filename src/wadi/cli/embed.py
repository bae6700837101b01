"""``wadi embed``: encode prompts once, into a cache that ``wadi distill`` trains from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli.family import add_family
from wadi.io.bounds import BATCH, COUNT, SIDE

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi embed``."""
    add = parser.add_argument
    add("--teacher", type=str, required=True, help="pipeline whose encoders are used: folder, Hub id, or zoo")
    add("--prompts", type=str, required=True, help="file, pattern or hf://OWNER/NAME, as for wadi distill")
    add("--prompts-field", type=str, default=None, help="field that holds the prompt, dotted if nested; default: a usual name")
    add("--out", type=str, required=True, help="folder of the cache; wadi distill takes it as --prompts")
    add("--limit", type=COUNT, default=None, help="encode only this many prompts, from the start")
    add("--batch", type=BATCH, default=16, help="prompts encoded at once")
    add("--shard-rows", type=COUNT, default=1024, help="prompts per file of the cache")
    add("--dtype", type=str, default="float32", help="type of the encoders, as in the run: float32, bfloat16 or float16")
    add(
        "--resolution",
        type=SIDE,
        nargs=2,
        default=None,
        help="height and width of the run's images in pixels; default: the model's",
    )
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Write the cache; the same command continues an interrupted one."""
    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.distill.embed_prompts import embed_prompts
    from wadi.parallel.device import dtype_of, find_device
    from wadi.prompts.reading import open_prompts
    from wadi.zoo.paths import resolve_teacher

    options = arguments.options
    dtype = dtype_of(options.dtype)
    prompts = open_prompts(options.prompts, options.prompts_field, options.limit)
    pipeline = load_pipeline(resolve_teacher(options.teacher), dtype, find_device(options.device))
    backbone = from_pipeline(pipeline, tuple(options.resolution) if options.resolution else None)
    out = embed_prompts(backbone, prompts, Path(options.out), options.batch, options.shard_rows)
    print(f"{len(prompts)} prompts: wadi distill --prompts {out} ...")
    return 0
