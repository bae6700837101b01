"""``wadi control eval``: how well the edges of generated images agree with the edges that were the condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.family import add_family
from wadi.errors import WadiError
from wadi.io.bounds import COUNT, GUIDANCE, ROUNDS, SCALE, STEPS, Whole
from wadi.io.markdown import split_at_markers, write_between_markers

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments
    from wadi.extras.control.agreement import Judge, Method, Trial

TRIAL_SEED = 500_000  # first seed of the images whose edges are the conditions; training uses seeds from 1,000,000
SHOWN = 6  # columns of the grid of images
BEGIN, END = "<!-- table: wadi control eval -->", "<!-- /table -->"


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi control eval``."""
    add = parser.add_argument
    add("--student", type=str, default="zoo", help="run or exported pipeline; zoo is the embedded student")
    add("--teacher", type=str, default="zoo", help="pipeline folder, Hub id, or zoo")
    add("--control", type=str, default="zoo", help="ControlNet of the teacher: folder, Hub id, or zoo")
    add("--tuned", type=str, default=None, help="the same ControlNet after training against the student, to compare with")
    add("--prompts", type=str, default="zoo", help="text file with one prompt a line")
    add("--sets", type=ROUNDS, default=3, help="repetitions with other conditions and noise; they give the spread")
    add("--count", type=Whole(2, COUNT.high), default=32, help="images per set")
    add("--steps", type=STEPS, default=25, help="steps of the teacher")
    add("--guidance-scale", type=GUIDANCE, default=None, help="guidance of the teacher; default: 2.5, for FLUX 1 (none)")
    strengths = "strengths of the teacher's ControlNet on the student"
    add("--strengths", nargs="*", type=SCALE, default=[0.5, 1.0, 1.5], help=strengths)
    add("--json", type=str, default=None, help="JSON file to write the scores to")
    add("--picture", type=str, default=None, help="PNG file to write: the conditions and the images for each")
    add("--page", type=str, default=None, help="Markdown file: the table replaces the one between its markers")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Generate with each combination of model and control, print a table of the scores, and write the files."""
    options = arguments.options
    _check_outputs(options)
    from wadi.extras.control import agreement
    from wadi.io.files import write_whole
    from wadi.parallel.device import keep_freed_memory

    keep_freed_memory()
    methods, trials, slow = _methods_and_trials(options)
    scores = agreement.score_methods(methods, trials, _judge() if options.teacher == "zoo" else None)
    table = agreement.score_table(scores, slow)
    print(table)
    if options.json is not None:
        write_whole(Path(options.json), (json.dumps(agreement.scores_as_json(scores), indent=1) + "\n").encode())
    if options.page is not None:
        write_between_markers(Path(options.page), BEGIN, END, table)
    if options.picture is not None:
        _write_grid(methods, trials[0], Path(options.picture))
    return 0


def _check_outputs(options: Any) -> None:
    """Raise `WadiError` for strengths out of range and files that cannot be written, before anything is loaded."""
    from wadi.extras.control.arguments import STRONGEST
    from wadi.io.outputs import check_writable

    for strength in options.strengths:
        if not 0 <= strength <= STRONGEST:
            raise WadiError(f"--strengths contains {strength}. Give numbers from 0 to {STRONGEST:g}.")
    if options.json is not None:
        check_writable(options.json)
    if options.picture is not None:
        check_writable(options.picture, (".png",))
    if options.page is not None:
        split_at_markers(Path(options.page), BEGIN, END)
        check_writable(options.page)


def _methods_and_trials(options: Any) -> tuple[dict[str, Method], list[Trial], str]:
    """Return the methods to compare by name, the conditions, and the name of the slow method."""
    from wadi.backbones import from_pipeline, load_pipeline
    from wadi.extras.control.agreement import method_of
    from wadi.extras.control.pipeline import with_control
    from wadi.pipelines.load import load
    from wadi.zoo.paths import resolve_teacher

    teacher = load_pipeline(resolve_teacher(options.teacher))
    student = load(None if options.student == "zoo" else options.student)
    backbone = from_pipeline(teacher)
    teacher.scheduler = backbone.sampler()
    guided = backbone.guided_call(backbone.teacher_guidance(options.guidance_scale, 2.5))
    plain = from_pipeline(student).call
    slow = f"teacher, {options.steps} steps, controlled"
    methods = {
        f"teacher, {options.steps} steps, no control": method_of(teacher, options.steps, guided),
        slow: method_of(with_control(teacher, options.control), options.steps, guided, 1.0),
        "student, one step, no control": method_of(student, 1, plain),
    }
    controlled = with_control(student, options.control)
    for strength in options.strengths:
        methods[f"student, one step, teacher's ControlNet at {strength:g}"] = method_of(controlled, 1, plain, strength)
    if options.tuned:
        methods["student, one step, fine-tuned ControlNet"] = method_of(with_control(student, options.tuned), 1, plain, 1.0)
    return methods, _trials(options, teacher, guided), slow


def _trials(options: Any, teacher: Any, guided: dict[str, Any]) -> list[Trial]:
    """Return conditions from images that the teacher generates, with seeds that neither training nor the evaluation uses."""
    from wadi.extras.control.agreement import Trial, method_of
    from wadi.extras.control.data import shuffled_prompts
    from wadi.prompts.reading import read_prompts

    generate = method_of(teacher, options.steps, guided)
    all_prompts = read_prompts(options.prompts)
    trials = []
    for number in range(options.sets):
        prompts = shuffled_prompts(all_prompts, options.count, TRIAL_SEED + number)
        seeds = [number * options.count + i for i in range(options.count)]
        trials.append(Trial(prompts, seeds, generate(prompts, [], [TRIAL_SEED + seed for seed in seeds])))
    return trials


def _judge() -> Judge:
    from wadi.zoo import concept_of, load_classifier

    classifier = load_classifier()
    return lambda images, prompts: classifier.top1(images, [concept_of(prompt) for prompt in prompts])


def _write_grid(methods: dict[str, Method], trial: Trial, path: Path) -> None:
    """Write a grid of the conditions and the images of each method; of several strengths, that of strength 1."""
    from wadi.io import grids

    rows, labels = [trial.conditions[:SHOWN]], ["condition"]
    for name, generate in methods.items():
        if name.endswith("steps, no control") or ("ControlNet at" in name and not name.endswith(" at 1")):
            continue
        images = generate(trial.prompts[:SHOWN], trial.conditions[:SHOWN], trial.seeds[:SHOWN])
        rows.append([grids.to_pil(image) for image in images])
        labels.append(name.replace(", ", "\n"))
    grids.save_png(grids.compose_grid(rows, labels, trial.prompts[:SHOWN], grids.enlargement(rows[0][0])), path)
