"""``wadi invert-relation``: exemplars of a relation to a token that means it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """The command; the same again continues an interrupted one."""
    from wadi.extras.relation.training import InversionConfig, check_out, invert_relation

    parser = make_parser("invert-relation")
    parser.add_argument("--exemplars", type=str, required=True, help="folder of pictures and descriptions.jsonl")
    parser.add_argument("--teacher", type=str, default="zoo", help="many-step pipeline: folder, Hub id, or zoo")
    parser.add_argument("--token", type=str, default="<R>", help="name of the token, as the descriptions write it")
    parser.add_argument(
        "--init", type=str, default=None, help="word to start from, one token; default: and, or the first preposition"
    )
    parser.add_argument("--out", type=str, required=True, help=".safetensors file to write; must not exist")
    parser.add_argument("--dtype", type=str, default="float32", help="float32 or bfloat16")
    parser.add_argument("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: the best there is")
    parser.add_class_arguments(InversionConfig)
    args = parse(parser, argv)

    import torch

    from wadi.backbones import load_pipeline
    from wadi.errors import WadiError
    from wadi.extras.relation.data import check_exemplars
    from wadi.parallel.device import find_device, keep_freed_memory
    from wadi.zoo.paths import resolve_teacher

    if args.dtype not in ("float32", "bfloat16"):
        raise WadiError(f"--dtype is {args.dtype!r}. Expected float32 or bfloat16: in float16 gradients vanish.")
    check_out(Path(args.out))
    check_exemplars(Path(args.exemplars), args.token)
    keep_freed_memory()
    config = InversionConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(InversionConfig)})
    pipeline = load_pipeline(resolve_teacher(args.teacher), getattr(torch, args.dtype), find_device(args.device))
    learned = invert_relation(pipeline, Path(args.exemplars), args.token, args.init, Path(args.out), config)
    print(
        f"denoising loss on the exemplars {learned.loss_before:.4f} -> {learned.loss_after:.4f} in {learned.seconds:.0f} s, "
        f"nearest words: {', '.join(learned.nearest)}\ntoken    {learned.path}"
    )
    return 0
