"""``wadi invert-relation``: learn a token for a relation from images that share it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from wadi.cli.family import add_family

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi invert-relation``."""
    from wadi.extras.relation.config import RelationConfig

    add = parser.add_argument
    add("--exemplars", type=str, required=True, help="folder of images and their descriptions.jsonl")
    add("--teacher", type=str, default="zoo", help="many-step pipeline: folder, Hub id, or zoo")
    add("--token", type=str, default="<R>", help="name of the token, as the descriptions write it")
    add("--init", type=str, default=None, help="word to start from, one token; default: and, or the first preposition")
    add("--out", type=str, required=True, help=".safetensors file to write; it must not exist")
    add("--dtype", type=str, default="float32", help="type of the weights: float32 or bfloat16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_class_arguments(RelationConfig)
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Learn the token and write its file; the same command continues an interrupted one."""
    from wadi.backbones import load_pipeline
    from wadi.extras.relation.config import RelationConfig
    from wadi.extras.relation.exemplars import check_exemplars
    from wadi.extras.relation.training import check_token_path, learn_token
    from wadi.parallel.device import dtype_of, find_device, keep_freed_memory
    from wadi.zoo.paths import resolve_teacher

    options = arguments.options
    dtype = dtype_of(options.dtype, ("float32", "bfloat16"))  # gradients vanish in float16
    check_token_path(Path(options.out))
    check_exemplars(Path(options.exemplars), options.token)
    keep_freed_memory()
    config = RelationConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(RelationConfig)})
    pipeline = load_pipeline(resolve_teacher(options.teacher), dtype, find_device(options.device))
    learned = learn_token(pipeline, Path(options.exemplars), options.token, options.init, Path(options.out), config)
    print(
        f"denoising loss on the exemplars {learned.loss_before:.4f} -> {learned.loss_after:.4f} in {learned.seconds:.0f} s, "
        f"nearest words: {', '.join(learned.nearest)}\ntoken    {learned.path}"
    )
    return 0
