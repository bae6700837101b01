"""``wadi plan``: the layers and parameters that a run would train, and the memory it needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wadi.cli.settings import add_settings, apply_files, config_from
from wadi.errors import WadiError
from wadi.io.bounds import PROCESSES

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments

prepare = apply_files


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi plan``."""
    parser.add_argument("--processes", type=PROCESSES, default=1, help="number of processes (GPUs) of the run")
    parser.add_argument("--json", action="store_true", help="print JSON, with memory in bytes")
    add_settings(parser)


def run(arguments: Arguments) -> int:
    """Print the plan. The architecture is that of the teacher, or the one that the preset is made for."""
    from wadi.distill.plan.architecture import load_architecture, read_architecture
    from wadi.distill.plan.plan import plan_run, plan_to_dict
    from wadi.distill.plan.text import describe_plan
    from wadi.distill.presets import MODELS

    options, config = arguments.options, config_from(arguments.options)
    if config.teacher:
        architecture = read_architecture(config.teacher)
    elif options.preset in MODELS:
        architecture = load_architecture(MODELS[options.preset])
    else:
        known = ", ".join(MODELS)
        raise WadiError(f"There is nothing to plan for. Give --teacher FOLDER_OR_HUB_ID, or --preset with one of {known}.")
    planned = plan_run(config, architecture, options.processes)
    print(json.dumps(plan_to_dict(planned), indent=2) if options.json else describe_plan(planned))
    return 0
