"""``wadi zoo``: make the embedded teacher, measure it and its students."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError

if TYPE_CHECKING:
    from torch import Tensor

    from wadi.zoo.evaluate import Drawer

USAGE = "wadi zoo train | eval | prompts | ship"


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """Run one of the subcommands; ``parse`` and ``make_parser`` are the command line's own."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}    (wadi zoo train --help tells the options)")
        return 0 if argv else 2
    commands = {"train": _train, "eval": _eval, "prompts": _prompts, "ship": _ship}
    if argv[0] not in commands:
        raise WadiError(f"There is no command 'zoo {argv[0]}'. Expected {USAGE}.")
    return commands[argv[0]](argv[1:], parse, make_parser)


def _train(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    from wadi.zoo import ZooConfig, train

    parser = make_parser("zoo")
    parser.prog = "wadi zoo train"
    parser.add_class_arguments(ZooConfig)
    print(train(ZooConfig(**parse(parser, argv).as_dict())))
    return 0


def _prompts(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    from wadi.zoo import training_prompts

    parser = make_parser("zoo")
    parser.prog = "wadi zoo prompts"
    parse(parser, argv)
    print("\n".join(training_prompts()))
    return 0


def _ship(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    from wadi.zoo.export import export_student

    parser = make_parser("zoo")
    parser.prog = "wadi zoo ship"
    parser.add_argument("run", help="run of the embedded teacher, whose student is to be the embedded one")
    parser.add_argument("--weights", type=str, required=True, help="folder of the embedded weights: src/wadi/zoo/weights")
    args = parse(parser, argv)
    print(export_student(Path(args.run), Path(args.weights)))
    return 0


def _eval(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    parser = make_parser("zoo")
    parser.prog = "wadi zoo eval"
    parser.add_argument("--runs", nargs="*", default=[], help="runs to measure beside the shipped student")
    parser.add_argument("--steps", type=int, default=25, help="steps of the teacher")
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="guidance of the teacher")
    parser.add_argument("--sets", type=int, default=3, help="repetitions with other seeds, which give the spread")
    parser.add_argument("--teacher_sets", type=int, default=1, help="the same for the teacher, which takes 50 times as long")
    parser.add_argument("--count", type=int, default=None, help="prompts per set; default: all 512")
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    parser.add_argument("--json", type=str, default=None, help="file to write the numbers to")
    args = parse(parser, argv)
    if min(args.sets, args.teacher_sets, args.steps) < 1 or (args.count is not None and args.count < 2):
        raise WadiError("Expected --sets, --teacher_sets and --steps of at least 1 and --count of at least 2.")
    import torch

    from wadi.device import keep_freed_memory
    from wadi.files import write_whole
    from wadi.zoo import load_classifier
    from wadi.zoo.evaluate import as_json, evaluate, table

    keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    drawers = generators(args.runs, args.steps, args.guidance_scale)
    scores = evaluate(drawers, next(iter(drawers.values())), load_classifier(), args.sets, args.count, args.teacher_sets)
    print(table(scores))
    if args.json is not None:
        write_whole(Path(args.json), (json.dumps(as_json(scores), indent=1) + "\n").encode())
    return 0


def generators(runs: Sequence[str], steps: int, guidance_scale: float) -> dict[str, Drawer]:
    """The teacher in many steps, in one from the last timestep and from the shipped student's, the student, and ``runs``."""
    from wadi.backbones import from_pipeline
    from wadi.embedded import embedded
    from wadi.generate import load, teacher_of
    from wadi.sampling import one_step_scheduler

    student = json.loads((embedded("student") / "wadi.json").read_text(encoding="utf-8"))
    found = {f"teacher, {steps} steps": drawer(teacher_of(), steps, guidance_scale)}
    last = from_pipeline(teacher_of()).process.num_timesteps - 1
    for timestep in dict.fromkeys((last, student["timestep"])):
        forced = teacher_of()
        forced.scheduler = one_step_scheduler(from_pipeline(forced), timestep)
        found[f"teacher forced to one step, t = {timestep}"] = drawer(forced)
    found["shipped student, one step"] = drawer(load())
    for run_folder in runs:
        found[f"{Path(run_folder).name}, one step"] = drawer(load(run_folder))
    return found


def drawer(pipeline: Any, steps: int = 1, guidance_scale: float = 0.0) -> Drawer:
    """A pipeline as a function from prompts and seeds to pictures ``(B, 3, h, w)`` in [0, 1]."""
    import numpy as np
    import torch

    from wadi.generate import draw

    def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        drawn = draw(pipeline, prompts, seeds, steps, guidance_scale, batch=64).pictures
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2) / 255

    return pictures
