"""``wadi study``: train, evaluate and analyse a grid of settings and seeds, and collect the results in one table."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wadi.cli.family import add_family
from wadi.io.bounds import PROCESSES, Number

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from wadi.cli.parser import Arguments
    from wadi.study.engines import Engine

FAILED_RUNS = 3  # exit code if the study went through, but runs failed


def add_options(parser: ArgumentParser) -> None:
    """Add the options of ``wadi study``."""
    add = parser.add_argument
    add("file", help="YAML file with base, grid or cells, seeds, eval, budget and tune; see docs/study.md")
    add("--out", type=str, required=True, help="folder of the study; the same command continues it")
    add("--plan", action="store_true", help="print the number of runs and hours, from a short run of each cell, and stop")
    add("--jobs", type=PROCESSES, default=1, help="number of runs at once on this machine")
    add("--address", type=str, default=None, help="Ray cluster to run on: auto, local, HOST:PORT or ray://HOST:PORT")
    add("--cpus", type=Number(0, 65_536), default=1.0, help="with --address: CPUs of one run")
    add("--gpus", type=Number(0, 1024), default=0.0, help="with --address: GPUs of one run")
    add_family(parser)


def run(arguments: Arguments) -> int:
    """Run or continue the study and print its table. Exit code 3 = some runs failed, the others are done."""
    from wadi.cli.parser import flag
    from wadi.errors import WadiError
    from wadi.study.cells import expand
    from wadi.study.engines import check_workers
    from wadi.study.file import read_study
    from wadi.study.run import plan, run_study

    options = arguments.options
    check_workers(options.jobs, options.address)
    if options.address is None and (unused := sorted(arguments.changed & {"cpus", "gpus"})):
        raise WadiError(f"{flag(unused[0])} has no effect without --address. Leave it out.")
    file, out = Path(options.file), Path(options.out)
    study = read_study(file)
    if options.family is not None:  # the processes of the runs find it in their settings
        study = replace(study, base={**study.base, "family": options.family})
    expand(study)  # report its faults before a cluster is asked
    with _engine(options) as engine:
        if options.plan:
            print(plan(study, out, engine, options.jobs))
            return 0
        rows = run_study(study, out, engine, file.stem, partial(print, flush=True))
    failed = [row for row in rows if row.status == "failed"]
    for row in failed:
        print(f"failed  {row.cell}, seed {row.seed}: {row.error}")
    print(f"results  {out / 'results.html'}")
    return FAILED_RUNS if failed else 0


def _engine(options: Any) -> AbstractContextManager[Engine]:
    """Return what runs jobs: this machine, or a cluster, which must answer."""
    if options.address is None:
        from wadi.study.engines import run_here

        return nullcontext(partial(run_here, workers=options.jobs))
    from wadi.study.ray_engine import cluster

    return cluster(options.address, options.cpus, options.gpus)
