"""``wadi eval``: how good are these pictures, or those that this run draws?"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.evaluate.generators import Generator, Source
    from wadi.evaluate.protocols import Protocol
    from wadi.evaluate.run import Evaluation, Reference

TEACHER = "teacher"  # as --reference: the teacher behind the first source draws it


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """The command; the same again draws only what is missing and takes features it has seen from the cache."""
    parser = _options(make_parser("eval"))
    args = parse(parser, argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.compare is not None:
        from wadi.evaluate.result import compare

        if others := sorted(given - {"compare"}):
            raise WadiError(f"--compare reads two result files; --{others[0]} has no effect beside it. Leave it out.")
        print(compare(*args.compare))
        return 0
    import torch

    from wadi.parallel.device import find_device, keep_freed_memory
    from wadi.parallel.ranks import Ranks, make_accelerator

    keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.rounds:
        print("--rounds has no effect: spreads are computed without resampling (docs/metrics.md).", file=sys.stderr)
    device = find_device(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = make_accelerator(device, None, Path(args.pictures)).device
    return _evaluate(args, given, argv, device, Ranks())


def _evaluate(args: Any, given: set[str], argv: Sequence[str], device: Any, ranks: Any) -> int:
    _check_outputs(args)
    protocol = _protocol(args)
    _refuse_unused(args, given, protocol, device)
    generators, folders = _entrants(args, protocol, device)
    evaluation = _evaluation(args, protocol, _reference(args, protocol, device), device, ranks)
    if generators:
        evaluation.draw(generators)
    if ranks.index > 0:  # the first process measures
        return 0
    rows = [evaluation.drawn_row(generator) for generator in generators]
    if args.speed and generators:
        from wadi.evaluate.run import time_generators

        prompts = protocol.prompts if protocol is not None else []
        speeds = time_generators(generators, prompts, args.speed, args.draw_batch, str(device))
        rows = [replace(row, speed=speed) for row, speed in zip(rows, speeds, strict=True)]
    rows += [evaluation.folder_row(path) for path in folders]
    _tell(args, evaluation.result(rows, shlex.join(["wadi", "eval", *argv])))
    return 0


def _check_outputs(args: Any) -> None:
    """Refuse places that cannot be written before anything is generated."""
    from wadi.evaluate.result import check_table
    from wadi.io.outputs import check_writable

    if args.out is not None:
        check_writable(args.out)
    if args.table is not None:
        check_table(Path(args.table))


def _refuse_unused(args: Any, given: set[str], protocol: Protocol | None, device: Any) -> None:
    from wadi.evaluate.unused import Request, refuse_unused

    kinds = {
        "folder" if source is None else "pipeline" if source.pipeline else "student" for _, source in _sources(args, device)
    }
    teachers = args.beside_teacher or args.reference == TEACHER or (args.protocol == "zoo" and not args.what)
    metrics, features = _metrics(args, protocol), args.features or (protocol.features if protocol is not None else None)
    refuse_unused(Request(given, metrics, args.protocol, kinds, teachers, _weights(args), features))


def _metrics(args: Any, protocol: Protocol | None) -> tuple[str, ...]:
    """Those of ``--metrics``, else those of the protocol."""
    metrics = tuple(filter(None, (args.metrics or "").replace(" ", ",").split(",")))
    return protocol.metrics if protocol is not None and not metrics else metrics


def _weights(args: Any) -> dict[str, str]:
    """``--weights`` as names and places.

    Raises:
        WadiError: if an entry is not ``NAME=PLACE``, or a name comes twice.
    """
    places: dict[str, str] = {}
    for entry in args.weights:
        name, equals, place = entry.partition("=")
        if not (name and equals and place):
            raise WadiError(f"--weights has {entry!r}. Each entry is NAME=PLACE, such as clip=openai/clip-vit-large-patch14.")
        if name in places:
            raise WadiError(f"--weights names {name!r} twice. Give one place.")
        places[name] = place
    return places


def _options(parser: Any) -> Any:
    from wadi.io.bounds import BATCH, COUNT, GUIDANCE, SEED, STEPS, THREADS, Whole

    add = parser.add_argument
    add("what", nargs="*", default=[], help="folders of pictures; or runs, adapters, pipelines (folder or Hub id), zoo")
    add("--compare", nargs=2, default=None, help="two result files: print both if they were measured alike")
    add("--protocol", type=str, default=None, help="zoo, coco2014-30k, coco2017-5k, or a file of prompts")
    add("--reference", type=str, default=None, help="folder of pictures; a COCO folder for coco*; 'teacher': it draws them")
    add(
        "--metrics",
        type=str,
        default=None,
        help="comma-separated: fid kid fd kd pr clip diversity ...; default: the protocol's",
    )
    add("--features", type=str, default=None, help="network of fd, kd, pr, diversity: embedded, inception, dinov2[:NAME], zoo")
    add(
        "--prompts",
        type=str,
        default=None,
        help="file with the prompt of each image of a folder, in the natural order of their names (2 before 10)",
    )
    add("--pairs", type=str, default=None, help='JSON lines {"file": "0.png", "prompt": "..."}: images of a folder by name')
    add(
        "--size",
        type=Whole(1, 8192),
        default=None,
        help="crop to the central square and resize to so many pixels; default: the protocol's",
    )
    add("--count", type=COUNT, default=None, help="only so many prompts of the protocol")
    add("--set", type=Whole(0, 10**12), default=1, help="which seeds: set s has s * 1000000 + index; 0 is the reference's")
    add("--ids", type=str, default=None, help="file of COCO annotation ids in place of the documented choice")
    add("--coco_seed", type=SEED, default=0, help="of the documented choice of captions")
    add("--teacher", type=str, default=None, help="pipeline in place of the one that an adapter names")
    add("--steps", type=STEPS, default=1, help="of a pipeline with its own scheduler")
    add(
        "--guidance_scale",
        type=GUIDANCE,
        default=None,
        help="of --steps; default: none in one step; else 3, for FLUX 1 (none)",
    )
    add("--beside_teacher", action="store_true", help="measure the teacher too, in many steps and, undistilled, in one")
    add("--teacher_steps", type=STEPS, default=25, help="of the teacher")
    add(
        "--teacher_guidance_scale",
        type=GUIDANCE,
        default=None,
        help="of the teacher; default: 3; zoo 2.5; FLUX 1 (none)",
    )
    add("--speed", type=Whole(0, 10_000), default=0, help="time so many calls of each generator, in turns; 0: none")
    add("--k", type=Whole(1, 10_000), default=3, help="of the nearest neighbours")
    add("--resize", type=str, default="clean", help="filter before a feature network: clean, legacy-tf, legacy-torch, ...")
    add("--no_spread", action="store_true", help="leave out the standard deviations")
    add(
        "--rounds",
        type=Whole(0, 1_000_000),
        default=None,
        help="of older versions: 0 is --no_spread, other values have no effect",
    )
    add("--inception", type=str, default=None, help="inception-2015-12-05.pt; default: in the cache folder")
    add("--download", action="store_true", help="fetch that file if it is missing (96 MB)")
    add(
        "--weights",
        type=str,
        nargs="*",
        default=[],
        help="NAME=PATH of a scorer's weights, as clip=openai/clip-vit-large-patch14",
    )
    add(
        "--pictures",
        type=str,
        default="runs/eval",
        help="folder in which drawn pictures are kept, and from which drawing goes on",
    )
    add("--out", type=str, default=None, help="result file (JSON)")
    add("--table", type=str, default=None, help="Markdown file: the table between its markers, or a new one")
    add("--batch", type=BATCH, default=32, help="pictures per feature network call")
    add("--draw_batch", type=BATCH, default=8, help="pictures drawn at once")
    add("--dtype", type=str, default="float32", help="of the generators: float32, bfloat16 or float16")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: the best there is")
    add("--threads", type=THREADS, default=None, help="of torch")
    return parser


def _protocol(args: Any) -> Protocol | None:
    from wadi.evaluate import protocols

    if args.protocol is None:
        return None
    if args.protocol == "zoo":
        return protocols.zoo(args.count)
    if args.protocol in protocols.COCO:
        if args.reference is None:
            raise WadiError(
                f"Protocol {args.protocol} needs a COCO folder. Expected --reference FOLDER, with annotations/ in it."
            )
        return protocols.coco(args.protocol, args.reference, args.coco_seed, args.ids, args.count)
    if not Path(args.protocol).exists():
        raise WadiError(
            f"--protocol is {args.protocol!r}. Expected {', '.join(protocols.NAMES)}, or a file of prompts that is there."
        )
    return protocols.prompt_file(args.protocol, args.size, args.count)


def _sources(args: Any, device: Any) -> list[tuple[str, Source | None]]:
    """What was named; for the zoo's protocol its own student, if nothing was."""
    import torch

    from wadi.evaluate.generators import find

    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise WadiError(f"--dtype is {args.dtype!r}. Expected float32, bfloat16 or float16.")
    names = args.what or (["zoo"] if args.protocol == "zoo" else [])
    if not names:
        raise WadiError("Nothing to measure. Expected a folder of pictures, a run, an adapter, a pipeline, or --protocol zoo.")
    place = {"dtype": getattr(torch, args.dtype), "device": device, "teacher": args.teacher}
    return [(name, find(name, **place)) for name in names]


def _entrants(args: Any, protocol: Protocol | None, device: Any) -> tuple[list[Generator], list[str]]:
    """Generators in the order of their rows (teachers first, each once), and folders of pictures."""
    sources = _sources(args, device)
    folders = [name for name, source in sources if source is None]
    generators: list[Generator] = []
    if protocol is None and len(folders) < len(sources):
        raise WadiError("A run, adapter or pipeline draws its pictures by a protocol. Expected --protocol: see --help.")
    if args.beside_teacher or (args.protocol == "zoo" and not args.what):
        for _, source in sources:
            if source is not None:
                generators += _teachers(args, source)
    for _, source in sources:
        if source is not None:
            guidance = args.guidance_scale if args.steps == 1 else source.guidance(args.guidance_scale, 3.0)
            generators.append(source.plain(args.steps, guidance))
    once = {generator.key: generator for generator in generators}
    return list(once.values()), folders


def _teachers(args: Any, source: Source) -> list[Generator]:
    """The teacher in many steps, and forced to one: from its last timestep, and from the student's own if that is known."""
    many = source.many_steps(args.teacher_steps, _teacher_guidance(args, source))
    timesteps = dict.fromkeys((source.last_timestep(), source.timestep()))
    return [many, *(source.undistilled(timestep) for timestep in timesteps if timestep is not None)]


def _teacher_guidance(args: Any, source: Source) -> float:
    from wadi.evaluate.protocols import ZOO_GUIDANCE

    return source.guidance(args.teacher_guidance_scale, ZOO_GUIDANCE if args.protocol == "zoo" else 3.0)


def _reference(args: Any, protocol: Protocol | None, device: Any) -> Reference | None:
    from wadi.evaluate.generators import Source
    from wadi.evaluate.protocols import COCO, ZOO_GUIDANCE, ZOO_STEPS
    from wadi.evaluate.run import of_folder, of_protocol, of_teacher

    if args.protocol in COCO and protocol is not None:
        return of_protocol(protocol)
    if args.protocol == "zoo" and protocol is not None and args.reference is None:
        return of_teacher(Source("zoo", device=device).many_steps(ZOO_STEPS, ZOO_GUIDANCE), protocol)
    if args.reference != TEACHER:
        return of_folder(args.reference, protocol) if args.reference is not None else None
    source = next((source for _, source in _sources(args, device) if source is not None), None)
    if protocol is None or source is None:
        raise WadiError("--reference is 'teacher', and no teacher is known. Expected a run or an adapter, and --protocol.")
    return of_teacher(source.many_steps(args.teacher_steps, _teacher_guidance(args, source)), protocol)


def _evaluation(args: Any, protocol: Protocol | None, reference: Reference | None, device: Any, ranks: Any) -> Evaluation:
    from wadi.evaluate.pairs import read_pairs
    from wadi.evaluate.run import Evaluation
    from wadi.evaluate.score import Options
    from wadi.prompts.reading import read_prompts

    metrics = _metrics(args, protocol)
    options = Options(
        features=args.features or (protocol.features if protocol is not None else "embedded"), resize=args.resize,
        inception=args.inception, download=args.download, weights=_weights(args), k=args.k, batch=args.batch,
        spread=not (args.no_spread or args.rounds == 0),
        device=str(device),
    )  # fmt: skip
    named = [name for name in ("protocol", "prompts", "pairs") if getattr(args, name) is not None]
    if len(named) > 1:
        raise WadiError(f"Received --{' and --'.join(named)}. Each of them says the prompts: give one.")
    prompts = read_prompts(args.prompts) if args.prompts is not None else None
    pairs = read_pairs(args.pairs) if args.pairs is not None else None
    return Evaluation(
        metrics, options, protocol, reference, args.pictures, prompts=prompts, pairs=pairs, size=args.size, set_number=args.set,
        draw_batch=args.draw_batch, ranks=ranks,
    )  # fmt: skip


def _tell(args: Any, result: Any) -> None:
    from wadi.evaluate.result import table, write_table

    print(table(result.rows))
    print(f"protocol {result.hash}")
    if args.out is not None:
        result.save(Path(args.out))
    if args.table is not None:
        write_table(Path(args.table), result)
