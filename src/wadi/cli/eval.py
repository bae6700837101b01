"""``wadi eval``: evaluate images, or the images that a run generates by a protocol."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.eval_options import add_options, metrics_from, protocol_from, weights_from
from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.cli.parser import Arguments
    from wadi.evaluate.evaluation import Evaluation
    from wadi.evaluate.generators import Generator, Source
    from wadi.evaluate.protocols import Protocol
    from wadi.evaluate.reference import Reference
    from wadi.evaluate.result import Result

__all__ = ["add_options", "run"]

TEACHER = "teacher"  # as --reference: the teacher of the first source generates the reference images
GUIDANCE = 3.0  # of many steps, unless the family has its own


def run(arguments: Arguments) -> int:
    """Evaluate and print a table. The same command generates only missing images, and takes known features from the cache."""
    options = arguments.options
    if options.compare is not None:
        from wadi.cli.parser import flag
        from wadi.evaluate.result_table import comparison_table

        if others := sorted(arguments.changed - {"compare"}):
            raise WadiError(f"{flag(others[0])} has no effect with --compare, which only reads two result files. Leave it out.")
        print(comparison_table(*options.compare))
        return 0
    import torch

    from wadi.parallel.device import find_device, keep_freed_memory
    from wadi.parallel.ranks import Ranks, make_accelerator

    keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.rounds:
        print("--rounds has no effect: spreads are computed without resampling (docs/metrics.md).", file=sys.stderr)
    device = find_device(options.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = make_accelerator(device, None, Path(options.pictures)).device
    return _evaluate(arguments, device, Ranks.of_process_group())


def _evaluate(arguments: Arguments, device: Any, ranks: Any) -> int:
    options = arguments.options
    _check_outputs(options)
    protocol = protocol_from(options)
    sources = _sources(options, device)
    _check_unused(arguments, protocol, sources)
    generators, folders = _generators_and_folders(options, protocol, sources)
    reference = _reference(options, protocol, sources, device)
    evaluation = _evaluation(options, protocol, reference, device, ranks)
    if generators:
        evaluation.generate(generators)
    if ranks.index > 0:  # the first process computes the metrics
        return 0
    rows = [evaluation.generated_row(generator) for generator in generators]
    if options.speed and generators:
        from wadi.evaluate.timing import time_generators

        prompts = protocol.prompts if protocol is not None else []
        speeds = time_generators(generators, prompts, options.speed, options.draw_batch, str(device))
        rows = [replace(row, speed=speed) for row, speed in zip(rows, speeds, strict=True)]
    rows += [evaluation.folder_row(path) for path in folders]
    _write(options, evaluation.result(rows, shlex.join(["wadi", "eval", *arguments.words])))
    return 0


def _check_outputs(options: Any) -> None:
    """Raise `WadiError` for files that cannot be written, before anything is generated."""
    from wadi.evaluate.result_table import check_table
    from wadi.io.outputs import check_writable

    if options.out is not None:
        check_writable(options.out)
    if options.table is not None:
        check_table(Path(options.table))


def _check_unused(arguments: Arguments, protocol: Protocol | None, sources: list[tuple[str, Source | None]]) -> None:
    """Raise `WadiError` for options that would have no effect."""
    from wadi.evaluate.unused_options import Request, check_options_have_effect

    options = arguments.options
    kinds = {"folder" if source is None else "pipeline" if source.pipeline else "student" for _, source in sources}
    teachers = options.beside_teacher or options.reference == TEACHER or _embedded_student(options)
    metrics, features = (
        metrics_from(options, protocol),
        options.features or (protocol.features if protocol is not None else None),
    )
    given, weights = arguments.changed, weights_from(options)
    check_options_have_effect(Request(given, metrics, options.protocol, kinds, teachers, weights, features))


def _embedded_student(options: Any) -> bool:
    """Return whether the zoo's protocol evaluates its own student, next to its teacher: nothing else was named."""
    return options.protocol == "zoo" and not options.what


def _sources(options: Any, device: Any) -> list[tuple[str, Source | None]]:
    """Return each name of the command line with its generator; None for a folder of images."""
    from wadi.evaluate.generators import find
    from wadi.parallel.device import dtype_of

    dtype = dtype_of(options.dtype)
    names = ["zoo"] if _embedded_student(options) else options.what
    if not names:
        raise WadiError("Nothing to evaluate. Give a folder of images, a run, an adapter, a pipeline, or --protocol zoo.")
    return [(name, find(name, dtype=dtype, device=device, teacher=options.teacher)) for name in names]


def _generators_and_folders(
    options: Any, protocol: Protocol | None, sources: list[tuple[str, Source | None]]
) -> tuple[list[Generator], list[str]]:
    """Return the generators in the order of their rows (teachers first, each once), and the folders of images."""
    folders = [name for name, source in sources if source is None]
    generators: list[Generator] = []
    if protocol is None and len(folders) < len(sources):
        raise WadiError("A run, an adapter or a pipeline generates its images by a protocol. Give --protocol, see --help.")
    if options.beside_teacher or _embedded_student(options):
        for _, source in sources:
            if source is not None:
                generators += _teachers(options, source)
    for _, source in sources:
        if source is not None:
            own = options.steps in (None, 1) or source.is_student()  # a student has its guidance built in
            guidance = options.guidance_scale if own else source.guidance(options.guidance_scale, GUIDANCE)
            generators.append(source.plain(options.steps, guidance))
    once = {generator.key: generator for generator in generators}
    return list(once.values()), folders


def _teachers(options: Any, source: Source) -> list[Generator]:
    """Return the teacher in many steps, and in one: from its last timestep, and from that of the student if it is known."""
    many = source.many_steps(options.teacher_steps, _teacher_guidance(options, source))
    timesteps = dict.fromkeys((source.last_timestep(), source.timestep()))
    return [many, *(source.undistilled(timestep) for timestep in timesteps if timestep is not None)]


def _teacher_guidance(options: Any, source: Source) -> float:
    from wadi.evaluate.protocols import ZOO_GUIDANCE

    return source.guidance(options.teacher_guidance_scale, ZOO_GUIDANCE if options.protocol == "zoo" else GUIDANCE)


def _reference(
    options: Any, protocol: Protocol | None, sources: list[tuple[str, Source | None]], device: Any
) -> Reference | None:
    """Return what the images are compared with: the protocol's own, a folder, or images that a teacher generates."""
    from wadi.evaluate.generators import Source
    from wadi.evaluate.protocols import COCO, ZOO_GUIDANCE, ZOO_STEPS
    from wadi.evaluate.reference import folder_reference, protocol_reference, teacher_reference

    if options.protocol in COCO and protocol is not None:
        return protocol_reference(protocol)
    if options.protocol == "zoo" and protocol is not None and options.reference is None:
        return teacher_reference(Source("zoo", device=device).many_steps(ZOO_STEPS, ZOO_GUIDANCE), protocol)
    if options.reference != TEACHER:
        return folder_reference(options.reference, protocol) if options.reference is not None else None
    source = next((source for _, source in sources if source is not None), None)
    if protocol is None or source is None:
        raise WadiError("--reference teacher needs a run or an adapter whose teacher is known, and --protocol. Give both.")
    return teacher_reference(source.many_steps(options.teacher_steps, _teacher_guidance(options, source)), protocol)


def _evaluation(options: Any, protocol: Protocol | None, reference: Reference | None, device: Any, ranks: Any) -> Evaluation:
    from wadi.evaluate.evaluation import Evaluation
    from wadi.evaluate.metric_table import Options
    from wadi.evaluate.pairs import read_pairs
    from wadi.prompts.reading import read_prompts

    settings = Options(
        features=options.features or (protocol.features if protocol is not None else "embedded"), resize=options.resize,
        inception=options.inception, download=options.download, weights=weights_from(options), k=options.k,
        batch=options.batch, spread=not (options.no_spread or options.rounds == 0), device=str(device),
    )  # fmt: skip
    given = [name for name in ("protocol", "prompts", "pairs") if getattr(options, name) is not None]
    if len(given) > 1:
        raise WadiError(f"Received --{' and --'.join(given)}. Each of them gives the prompts: leave out all but one.")
    prompts = read_prompts(options.prompts) if options.prompts is not None else None
    pairs = read_pairs(options.pairs) if options.pairs is not None else None
    return Evaluation(
        metrics_from(options, protocol), settings, protocol, reference, options.pictures, prompts=prompts, pairs=pairs,
        size=options.size, set_number=options.set, batch=options.draw_batch, ranks=ranks,
    )  # fmt: skip


def _write(options: Any, result: Result) -> None:
    from wadi.evaluate.result_table import table, write_table

    print(table(result.rows))
    print(f"protocol {result.hash}")
    if options.out is not None:
        result.save(Path(options.out))
    if options.table is not None:
        write_table(Path(options.table), result)
