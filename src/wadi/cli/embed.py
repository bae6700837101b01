"""``wadi embed``: prompts to a cache of their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wadi.io.bounds import BATCH, COUNT, SIDE


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """The command; the same again continues an interrupted one."""
    parser = make_parser("embed")
    parser.add_argument("--teacher", type=str, required=True, help="pipeline folder, Hub id, or zoo: its encoders are used")
    parser.add_argument("--prompts", type=str, required=True, help="file, pattern or hf://OWNER/NAME, as for distill")
    parser.add_argument("--prompts_field", type=str, default=None, help="the field that holds the prompt, dotted if nested")
    parser.add_argument("--out", type=str, required=True, help="folder of the cache; distill takes it as --prompts")
    parser.add_argument("--limit", type=COUNT, default=None, help="only so many prompts from the start")
    parser.add_argument("--batch", type=BATCH, default=16, help="prompts encoded at once")
    parser.add_argument("--shard_rows", type=COUNT, default=1024, help="prompts in a file of the cache")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16: that of the run to come")
    parser.add_argument("--resolution", type=SIDE, nargs=2, default=None, help="height and width of the run to come")
    parser.add_argument("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: the best there is")
    args = parse(parser, argv)

    import torch

    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.distill.conditions import embed
    from wadi.errors import WadiError
    from wadi.parallel.device import find_device
    from wadi.prompts.reading import open_prompts
    from wadi.zoo.paths import resolve_teacher

    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise WadiError(f"--dtype is {args.dtype!r}. Expected float32, bfloat16 or float16.")
    prompts = open_prompts(args.prompts, args.prompts_field, args.limit)
    pipeline = load_pipeline(resolve_teacher(args.teacher), getattr(torch, args.dtype), find_device(args.device))
    backbone = from_pipeline(pipeline, tuple(args.resolution) if args.resolution else None)
    out = embed(backbone, prompts, Path(args.out), args.batch, args.shard_rows)
    print(f"{len(prompts)} prompts: wadi distill --prompts {out} ...")
    return 0
