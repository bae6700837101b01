"""Train students of one, two and four steps of the embedded teacher with the same budget, and compare them.

    python bench/few_steps.py --passes 1430 --out runs/few-steps --table docs/steps.md --json bench/results/few-steps.json

The objective is `dmd2`, with and without the GAN head. The budget of a run is a number of passes of a batch through the
network; a backward pass counts as two. On one machine it is the same training time, and unlike a measured time it is the
same on each. 1430 is what the preset ``demo`` uses. All runs share the warm-start pairs of ``OUT/pairs``: making them is not
part of the budget. An interrupted command continues where it was. The results in ``--json`` are kept, and those of other
seeds are added, so the seeds may be trained one after another, and on several machines. The times are measured at the end, in
one loop, of the last seed if all of its students are in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from machine import machine
from wadi.cli.main import main as wadi
from wadi.distill.config import DistillConfig
from wadi.distill.config_files import save_config
from wadi.distill.loop import distill
from wadi.distill.objectives import with_defaults
from wadi.distill.presets import preset
from wadi.distill.run_folder import WARM_START
from wadi.evaluate.generators import Generator, Source
from wadi.io import markdown
from wadi.pipelines.generate import Sampling, generate_images

TIMESTEPS = {1: (800,), 2: (799, 399), 4: (799, 599, 399, 199)}
PAIRS = 1024
GAN_WEIGHT = 0.03
WARM_SHARE = 0.4  # of the budget
FAKE_SHARE = 0.04  # of the budget, for the fake model alone
UPDATES = 2  # of the fake model in each step
TRAINED, EVALUATED = 3, 1  # passes of a network with and without gradient
TEACHER = {"steps": 25, "guidance_scale": 2.5}
ROUNDS = 20  # single images of each row that are timed
METRICS = {
    "fd efficientnet-lite0": "Frechet distance, EfficientNet-Lite0",
    "fd-zoo": "Frechet distance, zoo's classifier",
    "top1": "concept named (top-1)",
    "diversity": "same-prompt diversity",
}
BEGIN, END = "<!-- few steps -->", "<!-- /few steps -->"


@dataclass(frozen=True)
class Variant:
    """A row of the table: a student of ``steps`` steps, with or without the GAN head."""

    steps: int
    gan: bool

    @property
    def name(self) -> str:
        return f"{self.steps}-step{'-gan' if self.gan else ''}"

    @property
    def passes(self) -> dict[str, float]:
        """Passes of a step of the warm start, of the fake model alone, and of both updates.

        On average half of the earlier timesteps are computed to generate an image. The GAN needs the features with their
        gradient, and those of a sample in each update of the fake model.
        """
        earlier = (self.steps - 1) / 2 * EVALUATED
        guided_teacher = 2 * EVALUATED
        fake_in_loss = TRAINED if self.gan else EVALUATED
        fake = UPDATES * TRAINED * (2 if self.gan else 1)
        return {
            "warm": TRAINED,
            "fake": earlier + EVALUATED + fake,
            "both": earlier + TRAINED + guided_teacher + fake_in_loss + fake,
        }

    def config(self, out: Path, seed: int, passes: float) -> DistillConfig:
        """Return the settings of a run with a budget of ``passes``."""
        base, cost = preset("zoo"), self.passes
        warm = round(WARM_SHARE * passes / cost["warm"])
        fake_only = round(FAKE_SHARE * passes / cost["fake"])
        rest = round((1 - WARM_SHARE - FAKE_SHARE) * passes / cost["both"])
        return replace(
            base,
            out=str(out),
            seed=seed,
            steps=warm + fake_only + rest,
            objective="dmd2",
            objective_options={"gan_weight": GAN_WEIGHT} if self.gan else {},
            student=replace(base.student, timesteps=TIMESTEPS[self.steps]),
            fake=replace(base.fake, updates=UPDATES),
            warm_start=replace(base.warm_start, pairs=PAIRS, steps=warm, fake_steps=fake_only),
            sample_every=0,
            sample_prompts=base.sample_prompts[:4],
            sample_seeds=2,
            checkpoint_every=50,
        )


def start_from_pairs(out: Path, config: DistillConfig) -> None:
    """Give a new run the common pairs, which a run of one step has made in ``out/pairs``."""
    made, folder = out / "pairs", Path(config.out)
    if not (made / WARM_START).exists():
        distill(replace(Variant(1, False).config(made, 0, 100), steps=1))
    if not (folder / WARM_START).exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(with_defaults(config), folder / "config.yaml")  # a folder without one is not a run
        shutil.copyfile(made / WARM_START, folder / WARM_START)


def result_of(source: str, out: Path, count: int) -> list[dict[str, Any]]:
    """Return the rows of `wadi eval` for a run, or for the teacher and the shipped student of ``zoo``; stored in ``out``."""
    file = out / f"{'shipped' if source == 'zoo' else Path(source).name}.json"
    if not file.exists():
        line = ["eval", source, "--protocol", "zoo", "--count", str(count), "--metrics", "fd,fd-zoo,top1,diversity"]
        line += ["--beside-teacher"] if source == "zoo" else []
        if wadi([*line, "--device", "cpu", "--pictures", str(out / "images"), "--out", str(file)]):
            raise SystemExit(1)
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of each metric over training runs, given as their rows by seed."""
    values = {name: [run["metrics"][name]["value"] for run in runs.values()] for name in METRICS}
    return {name: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in values.items()}


def read_results(path: Path | None, passes: float) -> dict[str, Any]:
    """Return what an earlier command wrote to ``path``; empty results if there is none."""
    if path is None or not path.exists():
        return {"passes": passes, "machines": [], "rows": {}, "ms": {}, "ms_machine": ""}
    found: dict[str, Any] = json.loads(path.read_text())
    if found["passes"] != passes:
        raise SystemExit(
            f"{path} has the results of runs of {found['passes']:g} passes, not of {passes:g}: choose another file."
        )
    return found


def milliseconds(generators: dict[str, Generator]) -> dict[str, tuple[float, float]]:
    """Return the median time of one image generated alone, and half the distance of the quartiles, of each.

    They take turns, so that what else the machine does meanwhile changes all of them.
    """
    pipelines = {name: generator.open() for name, generator in generators.items()}
    times: dict[str, list[float]] = {name: [] for name in generators}
    for i in range(ROUNDS + 1):
        for name, generator in generators.items():
            sampling = Sampling(generator.steps, generator.guidance_scale)
            start = time.perf_counter()
            generate_images(pipelines[name], ["red apple"], [i], sampling)
            times[name].append(1000 * (time.perf_counter() - start))
    quartiles = {name: statistics.quantiles(each[1:], n=4) for name, each in times.items()}  # the first call sets things up
    return {name: (middle, (high - low) / 2) for name, (low, middle, high) in quartiles.items()}


def table(results: dict[str, Any], updates: dict[str, str]) -> str:
    """Return the Markdown table of the results."""
    header = ["", "training steps (warm start)", "seeds", *METRICS.values(), "ms per image"]
    digits = {"top1": 3, "ms": 0}
    rows = []
    for name, runs in results["rows"].items():
        values = summary(runs) | ({"ms": results["ms"][name]} if name in results["ms"] else {})
        cells = [
            f"{mean:.{digits.get(m, 2)}f} ± {std:.{digits.get(m, 2)}f}" if std else f"{mean:.{digits.get(m, 2)}f}"
            for m, (mean, std) in values.items()
        ]
        rows.append([name, updates.get(name, ""), len(runs) if name in updates else "", *cells])
    return markdown.table(header, rows)


def generators(runs: dict[str, Path]) -> dict[str, Generator]:
    """Return what makes the images of each row of the table, given the folders of the runs by name."""
    embedded = Source("zoo")
    return {
        "teacher, 25 steps": embedded.many_steps(**TEACHER),
        "shipped student, one step": embedded.plain(),
        **{name: Source(name, run=str(folder)).plain() for name, folder in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=float, default=1430, help="budget of each run")
    variants = {variant.name: variant for variant in (Variant(steps, gan) for gan in (False, True) for steps in TIMESTEPS)}
    parser.add_argument("--rows", nargs="*", default=list(variants), choices=list(variants), help="students to train")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=512, help="images of each student")
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--table", type=Path, default=None, help=f"page in which to replace what is between {BEGIN} and {END}")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    results = read_results(args.json, args.passes)
    rows: dict[str, dict[str, Any]] = results["rows"]
    if "teacher, 25 steps" not in rows:
        teacher, *_, student = result_of("zoo", args.out, args.count)
        rows["teacher, 25 steps"], rows["shipped student, one step"] = {"": teacher}, {"": student}
    for seed in args.seeds:  # all rows of a seed first, so that an early stop leaves complete comparisons
        for name in args.rows:
            if str(seed) in rows.setdefault(name, {}):
                continue
            folder = args.out / f"{name}-seed-{seed}"
            config = variants[name].config(folder, seed, args.passes)
            start_from_pairs(args.out, config)
            distill(config)
            rows[name][str(seed)] = result_of(str(folder), args.out, args.count)[0]
    results["machines"] = sorted({*results["machines"], machine()})
    here = {name: args.out / f"{name}-seed-{seed}" for name in variants for seed in args.seeds[-1:]}
    if here and all(folder.exists() for folder in here.values()):
        results |= {"ms": milliseconds(generators(here)), "ms_machine": machine()}
    steps = {name: variant.config(Path(), 0, args.passes) for name, variant in variants.items()}
    text = table(results, {name: f"{config.steps} ({config.warm_start.steps})" for name, config in steps.items()})
    where = (
        f"Training of {args.passes:g} passes each, {args.count} images of each row. ± is the standard deviation over the "
        f"training seeds; of ms it is half the distance of the quartiles over {ROUNDS} images (one seed, "
        f"{results['ms_machine']}). Trained on: {'. '.join(results['machines'])}."
    )
    print(text, where, sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.table:
        markdown.write_between_markers(args.table, BEGIN, END, f"{text}\n\n{where}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
