"""``wadi distill``: train a one-step student."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wadi.cli.settings import add_settings, apply_files, config_from
from wadi.errors import WadiError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments
    from wadi.distill.config import DistillConfig

prepare = apply_files


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi distill``."""
    parser.add_argument("--dry-run", action="store_true", help="print the settings of the run as YAML and stop")
    add_settings(parser)


def run(arguments: Arguments) -> int:
    """Train, then write the report; the same command continues an interrupted run."""
    config = config_from(arguments.options)
    for name in ("teacher", "prompts", "out"):
        if not getattr(config, name):
            raise WadiError(f"--{name} is missing. Give it on the command line, in a --config file or by --preset.")
    if arguments.options.dry_run:
        import yaml

        from wadi.distill.config_files import to_dict
        from wadi.distill.objectives import with_defaults

        print(yaml.safe_dump(to_dict(with_defaults(config)), sort_keys=False), end="")
        return 0
    return _distill(config)


def _distill(config: DistillConfig) -> int:
    from wadi.distill.loop import distill
    from wadi.distill.report.page import write_report
    from wadi.parallel.device import OutOfMemory

    try:
        folder = distill(config)
    except OutOfMemory as full:
        from wadi.distill.plan import fitting

        processes = int(os.environ.get("WORLD_SIZE", "1"))
        raise WadiError(f"{full} {fitting.suggest_settings(config, full.device, processes)}") from full
    if os.environ.get("RANK", "0") != "0":  # of several processes only the first one reports
        return 0
    report = write_report(folder)
    newest = max((folder / "samples").glob("step-*.png"))
    print(f"image    {newest}\nreport   {report}\nstudent  {folder / 'student'}")
    return 0
