"""``wadi control train``: train a ControlNet on images of a teacher, or against a student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wadi.cli.family import add_family
from wadi.cli.parser import flag
from wadi.errors import WadiError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments

OF_STUDENT = ("edge_weight", "keep_weight", "picture_weight")  # settings of the training against a student


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi control train``."""
    from wadi.extras.control.config import ControlConfig

    add = parser.add_argument
    add("--teacher", type=str, default="zoo", help="pipeline that generates the images: folder, Hub id, or zoo")
    add("--prompts", type=str, default="zoo", help="text file with one prompt a line")
    add("--student", type=str, default=None, help="run whose student the ControlNet is trained against, or zoo")
    add("--start", type=str, default=None, help="ControlNet to continue from: zoo, folder or Hub id; default: a new one")
    add("--device", type=str, default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_class_arguments(ControlConfig)
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Train, and print the folder of the ControlNet."""
    from wadi.backbones import load_pipeline
    from wadi.extras.control.config import ControlConfig
    from wadi.extras.control.load import load_control
    from wadi.extras.control.training import train_control
    from wadi.io.outputs import check_writable
    from wadi.parallel.device import find_device, keep_freed_memory
    from wadi.pipelines.load import load
    from wadi.prompts.reading import read_prompts
    from wadi.zoo.paths import resolve_teacher

    options = arguments.options
    values = options.as_dict()
    names = ("teacher", "prompts", "student", "start", "device", "family")
    config = ControlConfig(**{name: value for name, value in values.items() if name not in names})
    _check_options(arguments)
    check_writable(config.out, folder=True)
    keep_freed_memory()
    device = find_device(options.device)
    start = None if options.start is None else load_control(options.start).to(device).float()
    teacher = load_pipeline(resolve_teacher(options.teacher), device=device)
    student = None
    if options.student is not None:
        student = load(None if options.student == "zoo" else options.student, device=device)
    prompts = read_prompts(options.prompts)
    print(train_control(config, teacher, prompts, student, start))
    return 0


def _check_options(arguments: Arguments) -> None:
    """Raise `WadiError` for settings that would have no effect."""
    for name in OF_STUDENT:
        if arguments.options.student is None and name in arguments.named:
            raise WadiError(f"{flag(name)} has no effect without --student. Add --student, or leave out {flag(name)}.")
    if arguments.options.start is not None and "slim" in arguments.named:
        raise WadiError("--slim shapes a new ControlNet, but --start names an existing one. Leave out one of them.")
