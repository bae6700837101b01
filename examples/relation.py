"""Learn tokens for two relations on the embedded teacher, and evaluate them on teacher and student: see docs/relation.md.

python examples/relation.py                    evaluate; rewrites the image grid, the results and the tables of the page
python examples/relation.py --learn            learn the tokens again first, about two minutes
python examples/relation.py --make runs/zoo    compose the exemplars first, from the sprites of `wadi zoo train --stage data`
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from relation_scenes import (
    RELATIONS,
    TESTED,
    describe,
    make_exemplars,
    shows_above,
    shows_column,
    shows_edge,
    shows_order,
    write_exemplars,
)
from report import Drawer, drawer, latency, rewrite
from wadi.extras.control.agreement import mean_and_spread
from wadi.extras.relation.config import RelationConfig
from wadi.extras.relation.exemplars import read_exemplars
from wadi.extras.relation.state import statistics_path
from wadi.extras.relation.token_file import add_token
from wadi.extras.relation.training import learn_token
from wadi.io.files import write_whole
from wadi.io.grids import compose_grid, save_png, to_pil
from wadi.io.images import read_image
from wadi.parallel.device import keep_freed_memory
from wadi.pipelines.load import load, load_teacher_pipeline
from wadi.zoo import load_classifier, load_teacher
from wadi.zoo.recipe.icons import load_sprites

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "relation"
PAGE, PICTURE, RESULTS = ROOT / "docs/relation.md", ROOT / "docs/images/relation.png", ROOT / "bench/results/relation.json"
STEPS, GUIDANCE = 25, 2.5  # of the teacher
SETTINGS = RelationConfig(steps=250, lr=0.02)
SEEDS, SETS = 2, 3  # images of each prompt, and repetitions with other seeds


@dataclass(frozen=True)
class Row:
    """Results of a generator with or without tokens: shares of images, each with its standard deviation over several sets."""

    name: str
    above: tuple[float, ...]
    order: tuple[float, ...]
    column: tuple[float, ...]
    edge: tuple[float, ...]
    named: tuple[float, ...]
    ms: tuple[float, float] | None = None


def token(relation: str) -> str:
    """Return the token of a relation, such as ``<edge>``."""
    return f"<{relation}>"


def things(relation: str) -> list[tuple[str, str]]:
    """Return the pairs of things in the test prompts. None is in an exemplar. Prompts of ``edge`` only name the first."""
    following = (*TESTED[1:], TESTED[0])
    return list(zip(TESTED, following, strict=True))


def prompts(relation: str, with_token: bool) -> list[str]:
    """Return the test prompts. Without the token ``crab <above> lemon`` becomes ``crab lemon``."""
    texts = [describe(relation, pair, token(relation) if with_token else "") for pair in things(relation)]
    return [" ".join(text.split()) for text in texts]


def learn() -> None:
    """Learn both tokens from their exemplars, on the teacher."""
    for relation in RELATIONS:
        out = FOLDER / f"{relation}.safetensors"
        out.unlink(missing_ok=True)
        print(learn_token(load_teacher(), FOLDER / relation, token(relation), "on", out, SETTINGS))
        statistics_path(out).unlink()


def make(run: Path) -> None:
    """Compose sixteen exemplars of each relation."""
    sprites = load_sprites(run / "sprites.safetensors")
    for relation in RELATIONS:
        write_exemplars(FOLDER / relation, *make_exemplars(sprites, relation, 16, token=token(relation)))


def judge(stacked: Tensor, edged: Tensor, pairs: Sequence[tuple[str, str]], alone: Sequence[str]) -> list[float]:
    """Return the shares of a `Row`.

    Args:
        stacked: images of ``above`` for ``pairs`` of things.
        edged: images of ``edge`` for the things ``alone``.
    """
    classifier, (upper, lower) = load_classifier(), zip(*pairs, strict=True)
    shares = (
        shows_above(classifier, stacked, upper, lower),
        shows_order(classifier, stacked, upper, lower),
        shows_column(stacked),
        shows_edge(edged),
    )
    return [*(float(share.float().mean()) for share in shares), classifier.top1(edged, list(alone))]


def evaluate(name: str, draw: Drawer, with_token: bool, sets: int, timed: bool = True) -> Row:
    """Judge ``SEEDS`` images of each test prompt, ``sets`` times."""
    rows = []
    for first in range(sets):
        seeds = [1000 * first + i for i in range(SEEDS * len(TESTED))]
        stacked, edged = (
            draw([text for text in prompts(relation, with_token) for _ in range(SEEDS)], seeds) for relation in RELATIONS
        )
        pairs = [pair for pair in things("above") for _ in range(SEEDS)]
        rows.append(judge(stacked, edged, pairs, [pair[0] for pair in pairs]))
    columns = [mean_and_spread(column) for column in zip(*rows, strict=True)]
    return Row(name, *columns, ms=latency(draw, prompts("edge", with_token)) if timed else None)


def evaluate_exemplars() -> Row:
    """Judge the exemplars: how often the judges recognise a relation that is there."""
    sets = [read_exemplars(FOLDER / relation, token(relation), (64, 64)) for relation in RELATIONS]
    named = [
        [sentences[0].split(",")[0].split(token(relation)) for sentences in exemplars.sentences]
        for relation, exemplars in zip(RELATIONS, sets, strict=True)
    ]
    pairs, alone = [(a.strip(), b.strip()) for a, b in named[0]], [a.strip() for a, _ in named[1]]
    return Row("exemplars", *((share,) for share in judge(sets[0].images, sets[1].images, pairs, alone)))


def ablate(run: str | None, sets: int) -> list[Row]:
    """Evaluate the student with ``<above>`` learned without focal sampling, and without steering; see the columns `ABLATED`."""
    rows = []
    for name, changes in (("as above", {}), ("timesteps evenly", {"alpha": 0.0}), ("no steering", {"steer": 0.0})):
        student = load(run)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "above.safetensors" if changes else FOLDER / "above.safetensors"
            if changes:
                learn_token(load_teacher(), FOLDER / "above", token("above"), "on", path, replace(SETTINGS, **changes))
            add_token(student, path)
            rows.append(evaluate(name, drawer(student), True, sets, timed=False))
    return rows


ABLATED = ("above", "order", "column")
HEAD = {
    "above": "`<above>`: both named, each in its half",
    "order": "the likelier of the two in each half",
    "column": "a column",
    "edge": "`<edge>`: left of the middle",
    "named": "thing named",
}


def table(rows: Sequence[Row], shown: Sequence[str] = tuple(HEAD)) -> str:
    """Return the columns ``shown`` of the rows as a Markdown table, in per cent, with their times."""
    timed = any(row.ms for row in rows)
    lines = [f"| | {' | '.join(HEAD[name] for name in shown)} |{' ms per image |' if timed else ''}"]
    lines.append("|---" * (len(shown) + 1 + timed) + "|")
    for row in rows:
        cells = [" ± ".join(f"{100 * x:.0f}" for x in getattr(row, name)) + " %" for name in shown]
        cells += ([f"{row.ms[0]:.0f} ± {row.ms[1]:.0f}"] if row.ms else [""]) if timed else []
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_up(rows: Sequence[Row]) -> str:
    """Return a sentence on the time that one step takes."""
    slow, fast = (next(row.ms[0] for row in rows if row.ms and row.name.startswith(who)) for who in ("teacher", "student"))
    return f"One step takes {100 * (1 - fast / slow):.0f} % less time than {STEPS} ({slow / fast:.0f} times as fast)."


def show(drawers: dict[str, Drawer]) -> Image.Image:
    """Return a grid of four prompts per relation: exemplars first, then teacher and student with and without the token."""
    columns = [(relation, i) for relation in RELATIONS for i in (1, 4, 6, 8)]
    seeds = list(range(len(columns)))
    rows = [[read_image(FOLDER / relation / f"{i:02d}.png") for relation, i in columns]]
    for draw in drawers.values():
        for with_token in (True, False):
            rows.append([to_pil(x) for x in draw([prompts(relation, with_token)[i] for relation, i in columns], seeds)])
    labels = ["exemplars", *(f"{name}\n{what}" for name in drawers for what in ("with token", "without"))]
    return compose_grid(rows, labels, [prompts(relation, True)[i] for relation, i in columns], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, help="compose the exemplars first; folder of the zoo run with sprites.safetensors")
    parser.add_argument("--learn", action="store_true", help="learn the tokens first")
    parser.add_argument("--ablate", action="store_true", help="also learn and evaluate tokens without the parts of the method")
    parser.add_argument("--run", help="run of a student; default: the shipped one")
    parser.add_argument("--sets", type=int, default=SETS, help="repetitions with other seeds")
    options = parser.parse_args()
    keep_freed_memory()
    if options.make:
        make(options.make)
    if options.make or options.learn:
        learn()
    teacher, student = load_teacher_pipeline(options.run), load(options.run)
    for pipeline in (teacher, student):
        for relation in RELATIONS:
            add_token(pipeline, FOLDER / f"{relation}.safetensors")
    drawers = {f"teacher, {STEPS} steps": drawer(teacher, STEPS, GUIDANCE), "student, one step": drawer(student)}
    save_png(show(drawers), PICTURE)
    rows = [
        evaluate(f"{name}, {'with token' if with_token else 'without'}", draw, with_token, options.sets)
        for name, draw in drawers.items()
        for with_token in (True, False)
    ]
    rows.append(evaluate_exemplars())
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    results = {"machine": machine, "rows": [asdict(row) for row in rows]}
    rewrite(PAGE, "measured", f"{table(rows)}\n\n{speed_up(rows)}")
    if options.ablate:
        ablated = ablate(options.run, options.sets)
        results["ablated"] = [{"name": row.name} | {key: getattr(row, key) for key in ABLATED} for row in ablated]
        rewrite(PAGE, "ablated", table(ablated, ABLATED))
    elif RESULTS.is_file():
        results["ablated"] = json.loads(RESULTS.read_text()).get("ablated", [])
    write_whole(RESULTS, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
