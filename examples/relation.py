"""Two relations of the embedded teacher, learned as tokens and measured on teacher and student: docs/relation.md.

python examples/relation.py                    measure; rewrites the picture, the figures and the page's table
python examples/relation.py --learn            learn the tokens anew first, about two minutes
python examples/relation.py --make runs/zoo    lay out the exemplars anew, from the sprites of `wadi zoo train --stage data`
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
from wadi.extras.relation.data import read_exemplars
from wadi.extras.relation.training import InversionConfig, add_token, invert_relation
from wadi.io.files import write_whole
from wadi.io.grids import compose_grid, save_png, to_pil
from wadi.io.images import read_image
from wadi.parallel.device import keep_freed_memory
from wadi.pipelines.load import load, load_teacher_pipeline
from wadi.zoo import load_classifier, load_teacher
from wadi.zoo.recipe.icons import load_sprites

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "relation"
PAGE, PICTURE, FIGURES = ROOT / "docs/relation.md", ROOT / "docs/images/relation.png", ROOT / "bench/results/relation.json"
STEPS, GUIDANCE = 25, 2.5  # of the teacher
SETTINGS = InversionConfig(steps=250, lr=0.02)
SEEDS, SETS = 2, 3  # pictures of each prompt, and repetitions with other seeds


@dataclass(frozen=True)
class Row:
    """One generator with or without tokens: shares of pictures, mean and standard deviation over sets of seeds if several."""

    name: str
    above: tuple[float, ...]
    order: tuple[float, ...]
    column: tuple[float, ...]
    edge: tuple[float, ...]
    named: tuple[float, ...]
    ms: tuple[float, float] | None = None


def token(relation: str) -> str:
    """``<edge>``."""
    return f"<{relation}>"


def things(relation: str) -> list[tuple[str, str]]:
    """What the test prompts relate; none of it is in an exemplar. The second is not named by ``edge``."""
    following = (*TESTED[1:], TESTED[0])
    return list(zip(TESTED, following, strict=True))


def prompts(relation: str, with_token: bool) -> list[str]:
    """The test prompts, or the same without the token: ``crab lemon`` for ``crab <above> lemon``."""
    said = [describe(relation, pair, token(relation) if with_token else "") for pair in things(relation)]
    return [" ".join(text.split()) for text in said]


def learn() -> None:
    """Both tokens from their exemplars, on the teacher."""
    for relation in RELATIONS:
        out = FOLDER / f"{relation}.safetensors"
        out.unlink(missing_ok=True)
        print(invert_relation(load_teacher(), FOLDER / relation, token(relation), "on", out, SETTINGS))


def make(run: Path) -> None:
    """Sixteen exemplars of each relation."""
    sprites = load_sprites(run / "sprites.safetensors")
    for relation in RELATIONS:
        write_exemplars(FOLDER / relation, *make_exemplars(sprites, relation, 16, token=token(relation)))


def judge(stacked: Tensor, edged: Tensor, pairs: Sequence[tuple[str, str]], alone: Sequence[str]) -> list[float]:
    """What `Row` holds but its time, of pictures of ``above`` for ``pairs`` and of pictures of ``edge`` for ``alone``."""
    classifier, (upper, lower) = load_classifier(), zip(*pairs, strict=True)
    shares = (
        shows_above(classifier, stacked, upper, lower),
        shows_order(classifier, stacked, upper, lower),
        shows_column(stacked),
        shows_edge(edged),
    )
    return [*(float(share.float().mean()) for share in shares), classifier.top1(edged, list(alone))]


def measure(name: str, draw: Drawer, with_token: bool, sets: int, timed: bool = True) -> Row:
    """Judge ``SEEDS`` pictures of each test prompt, ``sets`` times."""
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


def exemplars() -> Row:
    """The judges' own limits: what they say of the exemplars."""
    found = [read_exemplars(FOLDER / relation, token(relation), (64, 64)) for relation in RELATIONS]
    named = [[said[0].split(",")[0].split(token(r)) for said in x.sentences] for r, x in zip(RELATIONS, found, strict=True)]
    pairs, alone = [(a.strip(), b.strip()) for a, b in named[0]], [a.strip() for a, _ in named[1]]
    return Row("exemplars", *((share,) for share in judge(found[0].pictures, found[1].pictures, pairs, alone)))


def ablate(run: str | None, sets: int) -> list[Row]:
    """The student with ``<above>`` learned without focal sampling, and without steering; only `ABLATED` means anything."""
    rows = []
    for name, changes in (("as above", {}), ("timesteps evenly", {"alpha": 0.0}), ("no steering", {"steer": 0.0})):
        student = load(run)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "above.safetensors" if changes else FOLDER / "above.safetensors"
            if changes:
                invert_relation(load_teacher(), FOLDER / "above", token("above"), "on", path, replace(SETTINGS, **changes))
            add_token(student, path)
            rows.append(measure(name, drawer(student), True, sets, timed=False))
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
    """Columns ``shown`` of the rows as Markdown, in per cent, and their times."""
    timed = any(row.ms for row in rows)
    lines = [f"| | {' | '.join(HEAD[name] for name in shown)} |{' ms per picture |' if timed else ''}"]
    lines.append("|---" * (len(shown) + 1 + timed) + "|")
    for row in rows:
        cells = [" ± ".join(f"{100 * x:.0f}" for x in getattr(row, name)) + " %" for name in shown]
        cells += ([f"{row.ms[0]:.0f} ± {row.ms[1]:.0f}"] if row.ms else [""]) if timed else []
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_up(rows: Sequence[Row]) -> str:
    """How much less time one step takes."""
    slow, fast = (next(row.ms[0] for row in rows if row.ms and row.name.startswith(who)) for who in ("teacher", "student"))
    return f"One step takes {100 * (1 - fast / slow):.0f} % less time than {STEPS} ({slow / fast:.0f} times as fast)."


def show(drawers: dict[str, Drawer]) -> Image.Image:
    """Four prompts of each relation: exemplars above, then teacher and student with the token and without."""
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
    parser.add_argument("--make", type=Path, help="run of the zoo with sprites.safetensors")
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--ablate", action="store_true")
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
        measure(f"{name}, {'with token' if with_token else 'without'}", draw, with_token, options.sets)
        for name, draw in drawers.items()
        for with_token in (True, False)
    ]
    rows.append(exemplars())
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    figures = {"machine": machine, "rows": [asdict(row) for row in rows]}
    rewrite(PAGE, "measured", f"{table(rows)}\n\n{speed_up(rows)}")
    if options.ablate:
        ablated = ablate(options.run, options.sets)
        figures["ablated"] = [{"name": row.name} | {key: getattr(row, key) for key in ABLATED} for row in ablated]
        rewrite(PAGE, "ablated", table(ablated, ABLATED))
    elif FIGURES.is_file():
        figures["ablated"] = json.loads(FIGURES.read_text()).get("ablated", [])
    write_whole(FIGURES, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
