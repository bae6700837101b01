"""``wadi control``: condition images, ControlNets for a teacher or a student, and what they are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.errors import WadiError
from wadi.io.bounds import COUNT, GUIDANCE, ROUNDS, SCALE, STEPS, Whole
from wadi.io.markdown import split_at_markers, write_between_markers

if TYPE_CHECKING:
    from wadi.extras.control.agreement import Judge, Trial, Way

USAGE = "wadi control condition | train | eval"
TRIAL_SEED = 500_000  # of the pictures whose edges are the conditions; training draws from 1,000,000 on


def run(argv: Sequence[str], parse: Callable[..., Any], make_parser: Callable[[str], Any]) -> int:
    """Run one of the subcommands; ``parse`` and ``make_parser`` are the command line's own."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}    (wadi control train --help tells the options)")
        return 0 if argv else 2
    commands = {"condition": _condition, "train": _train, "eval": _eval}
    if argv[0] not in commands:
        raise WadiError(f"There is no command 'control {argv[0]}'. Expected {USAGE}.")
    parser = make_parser("control")
    parser.prog = f"wadi control {argv[0]}"
    return commands[argv[0]](argv[1:], parse, parser)


def _condition(argv: Sequence[str], parse: Callable[..., Any], parser: Any) -> int:
    parser.add_argument("picture", help="picture file")
    parser.add_argument("--kind", type=str, default="canny", help="canny, scribble, depth or pose")
    parser.add_argument("--model", type=str, default=None, help="folder or Hub id of the network for depth or pose")
    parser.add_argument("--size", type=str, default=None, help="WxH to bring the picture to first: edges do not shrink well")
    parser.add_argument("--out", type=str, default="condition.png", help="PNG to write")
    args = parse(parser, argv)
    import torch

    from wadi.extras.control.conditions import condition, fitted, read_picture
    from wadi.io.grids import save_png
    from wadi.io.outputs import check_writable
    from wadi.parallel.device import explained_when_full

    check_writable(args.out, (".png",))
    picture = read_picture(args.picture)
    if args.size is not None:
        picture = fitted(picture, _size(args.size))
    doing = f"{args.kind} of {picture.width} x {picture.height} pixels"
    with explained_when_full(torch.device("cpu"), lambda: doing, "Give --size with fewer pixels."):
        made = condition(args.kind, picture, args.model)
    save_png(made, Path(args.out))
    print(args.out)
    return 0


def _size(text: str) -> tuple[int, int]:
    """``WxH`` as ``(height, width)``."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise WadiError(f"--size is {text!r}. Expected WIDTHxHEIGHT in pixels, such as 512x512.")
    return int(height), int(width)


def _train(argv: Sequence[str], parse: Callable[..., Any], parser: Any) -> int:
    from wadi.extras.control.training import ControlConfig

    parser.add_class_arguments(ControlConfig)
    parser.add_argument("--teacher", type=str, default="zoo", help="pipeline folder or Hub id; draws the pictures")
    parser.add_argument("--prompts", type=str, default="zoo", help="text file with one prompt a line")
    parser.add_argument("--student", type=str, default=None, help="run to fine-tune against; 'zoo' = the embedded student")
    parser.add_argument("--start", type=str, default=None, help="ControlNet to go on from: 'zoo', folder or Hub id")
    parser.add_argument("--device", type=str, default=None, help="cpu, cuda, ...; default: the best there is")
    values = parse(parser, argv).as_dict()
    names = ("teacher", "prompts", "student", "start", "device")
    options = {name: values.pop(name) for name in names}
    config = ControlConfig(**values)
    _refuse_ignored(argv, options)
    from wadi.backbones import load_pipeline
    from wadi.extras.control.pipeline import load_control
    from wadi.extras.control.training import train
    from wadi.io.outputs import check_writable
    from wadi.parallel.device import find_device, keep_freed_memory
    from wadi.prompts.reading import read_prompts
    from wadi.zoo.paths import resolve_teacher

    check_writable(config.out, folder=True)
    keep_freed_memory()
    device = find_device(options["device"])
    start = None if options["start"] is None else load_control(options["start"]).to(device).float()
    teacher = load_pipeline(resolve_teacher(options["teacher"]), device=device)
    student = None if options["student"] is None else _student(options["student"], device)
    prompts = read_prompts(options["prompts"])
    print(train(config, teacher, prompts, student, start))
    return 0


def _refuse_ignored(argv: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raise `WadiError` for settings that would have no effect."""
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    if options["student"] is None and (names := sorted(given & {"picture_weight", "edge_weight", "keep_weight"})):
        raise WadiError(f"--{names[0]} is of a training against a student. Add --student or leave it out.")
    if options["start"] is not None and "slim" in given:
        raise WadiError("--slim is of a new ControlNet, and --start names one. Leave out one of them.")


def _student(name: str, device: Any = "cpu") -> Any:
    from wadi.pipelines.generate import load

    return load(None if name == "zoo" else name, device=device)


# --- eval -------------------------------------------------------------------------------------------------------------------


def _eval(argv: Sequence[str], parse: Callable[..., Any], parser: Any) -> int:
    parser.add_argument("--student", type=str, default="zoo", help="run or exported pipeline; 'zoo' = the embedded student")
    parser.add_argument("--teacher", type=str, default="zoo", help="pipeline folder or Hub id")
    parser.add_argument("--control", type=str, default="zoo", help="ControlNet of the teacher")
    parser.add_argument("--tuned", type=str, default=None, help="the same fine-tuned against the student")
    parser.add_argument("--prompts", type=str, default="zoo", help="text file with one prompt a line")
    parser.add_argument(
        "--sets", type=ROUNDS, default=3, help="repetitions with other conditions and noise, which give the spread"
    )
    parser.add_argument("--count", type=Whole(2, COUNT.high), default=32, help="pictures per set")
    parser.add_argument("--steps", type=STEPS, default=25, help="steps of the teacher")
    parser.add_argument("--guidance_scale", type=GUIDANCE, default=None, help="of the teacher; default: 2.5, for FLUX 1 (none)")
    parser.add_argument(
        "--strengths", nargs="*", type=SCALE, default=[0.5, 1.0, 1.5], help="of the teacher's control on the student"
    )
    parser.add_argument("--json", type=str, default=None, help="file to write the numbers to")
    parser.add_argument("--picture", type=str, default=None, help="PNG to write: conditions and what became of them")
    parser.add_argument("--page", type=str, default=None, help="Markdown file whose table is to be replaced by this one")
    args = parse(parser, argv)
    _check_outputs(args)
    from wadi.extras.control import agreement
    from wadi.io.files import write_whole
    from wadi.parallel.device import keep_freed_memory

    keep_freed_memory()
    ways, trials, slow = _ways_and_trials(args)
    scores = agreement.evaluate(ways, trials, _judge() if args.teacher == "zoo" else None)
    text = agreement.table(scores, slow)
    print(text)
    if args.json is not None:
        write_whole(Path(args.json), (json.dumps(agreement.as_json(scores), indent=1) + "\n").encode())
    if args.page is not None:
        write_between_markers(Path(args.page), BEGIN, END, text)
    if args.picture is not None:
        _picture(ways, trials[0], Path(args.picture))
    return 0


def _check_outputs(args: Any) -> None:
    """Raise `WadiError` for strengths out of range and files that cannot be written, before anything is loaded."""
    from wadi.extras.control.pipeline import STRONGEST
    from wadi.io.outputs import check_writable

    for strength in args.strengths:
        if not 0 <= strength <= STRONGEST:
            raise WadiError(f"--strengths has {strength}. Expected numbers from 0 to {STRONGEST:g}.")
    if args.json is not None:
        check_writable(args.json)
    if args.picture is not None:
        check_writable(args.picture, (".png",))
    if args.page is not None:
        split_at_markers(Path(args.page), BEGIN, END)
        check_writable(args.page)


def _ways_and_trials(args: Any) -> tuple[dict[str, Way], list[Trial], str]:
    """The ways of drawing by name, the conditions, and the name of the slow way."""
    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.extras.control.agreement import way
    from wadi.extras.control.pipeline import with_control
    from wadi.zoo.paths import resolve_teacher

    teacher, student = load_pipeline(resolve_teacher(args.teacher)), _student(args.student)
    backbone = from_pipeline(teacher)
    teacher.scheduler = backbone.sampler()
    guided = backbone.guided_call(backbone.teacher_guidance(args.guidance_scale, 2.5))
    plain = from_pipeline(student).call
    slow = f"teacher, {args.steps} steps, controlled"
    ways = {
        f"teacher, {args.steps} steps, no control": way(teacher, args.steps, guided),
        slow: way(with_control(teacher, args.control), args.steps, guided, 1.0),
        "student, one step, no control": way(student, 1, plain),
    }
    under = with_control(student, args.control)
    for strength in args.strengths:
        ways[f"student, one step, teacher's ControlNet at {strength:g}"] = way(under, 1, plain, strength)
    if args.tuned:
        ways["student, one step, fine-tuned ControlNet"] = way(with_control(student, args.tuned), 1, plain, 1.0)
    return ways, _trials(args, teacher, guided), slow


def _trials(args: Any, teacher: Any, guided: dict[str, Any]) -> list[Trial]:
    """Conditions from the teacher's own pictures, of noise that nothing was trained on and nothing is drawn from."""
    from wadi.extras.control.agreement import Trial, way
    from wadi.extras.control.data import chosen_prompts
    from wadi.prompts.reading import read_prompts

    draw = way(teacher, args.steps, guided)
    every = read_prompts(args.prompts)
    trials = []
    for number in range(args.sets):
        prompts = chosen_prompts(every, args.count, TRIAL_SEED + number)
        seeds = [number * args.count + i for i in range(args.count)]
        trials.append(Trial(prompts, seeds, draw(prompts, [], [TRIAL_SEED + seed for seed in seeds])))
    return trials


def _judge() -> Judge:
    from wadi.zoo import concept_of, load_classifier

    classifier = load_classifier()
    return lambda pictures, prompts: classifier.top1(pictures, [concept_of(prompt) for prompt in prompts])


def _picture(ways: dict[str, Way], trial: Trial, path: Path) -> None:
    from wadi.io import grids
    from wadi.pipelines.generate import enlargement

    count = 6
    rows, labels = [trial.conditions[:count]], ["condition"]
    for name, draw in ways.items():
        if name.endswith("steps, no control") or ("ControlNet at" in name and not name.endswith(" at 1")):
            continue  # the picture shows each kind once
        drawn = draw(trial.prompts[:count], trial.conditions[:count], trial.seeds[:count])
        rows.append([grids.to_pil(picture) for picture in drawn])
        labels.append(name.replace(", ", "\n"))
    grids.save_png(grids.compose_grid(rows, labels, trial.prompts[:count], enlargement(rows[0][0])), path)


BEGIN, END = "<!-- table: wadi control eval -->", "<!-- /table -->"
