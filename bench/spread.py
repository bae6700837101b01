"""Compare the spread from one set of images with the scatter of sets from other seeds.

    python bench/spread.py --sets 8 --json bench/results/spread.json

Runs `wadi eval` on the embedded student with `--set 1` to `--set N`: the same prompts and reference, other seeds. Prints the
standard deviation over the sets, and the `±` of one set (root mean square over the sets).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from machine import machine
from wadi.cli.main import main
from wadi.io import markdown

METRICS = "fd,kd,pr,fd-zoo,top1,diversity"


def rows(values: dict[str, list[tuple[float, float]]]) -> list[dict[str, float | str]]:
    """Return one row for each metric, from its ``(value, std)`` in each set."""
    metric_rows: list[dict[str, float | str]] = []
    for name, pairs in values.items():
        numbers, spreads = zip(*pairs, strict=True)
        metric_rows.append(
            {
                "metric": name, "mean": statistics.fmean(numbers), "scatter": statistics.stdev(numbers),
                "estimate": statistics.fmean(spread**2 for spread in spreads) ** 0.5,
                "smallest": min(spreads), "largest": max(spreads),
            }
        )  # fmt: skip
    return metric_rows


def table(metric_rows: list[dict[str, float | str]], sets: int) -> str:
    """Return the rows as a Markdown table."""
    header = ["metric", f"mean of {sets} sets", "scatter of the sets", "± of one set", "smallest to largest ±"]
    cells = [
        [str(row["metric"]), *(f"{row[name]:.3g}" for name in ("mean", "scatter", "estimate")),
         f"{row['smallest']:.3g} to {row['largest']:.3g}"]
        for row in metric_rows
    ]  # fmt: skip
    return markdown.table(header, cells)


def measure(sets: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return ``(value, std)`` of each metric and set. Existing results are read instead of computed."""
    values: dict[str, list[tuple[float, float]]] = {}
    for number in range(1, sets + 1):
        out = folder / f"set-{number}.json"
        if not out.exists():
            line = ["eval", "zoo", "--protocol", "zoo", "--set", str(number), "--metrics", METRICS, "--device", "cpu"]
            if main([*line, "--out", str(out)]):
                raise SystemExit(1)
        (row,) = json.loads(out.read_text())["rows"]
        for name, number_of in row["metrics"].items():
            values.setdefault(name, []).append((number_of["value"], number_of["std"]))
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=8, help="number of sets of 512 images")
    parser.add_argument("--results", type=Path, default=Path("runs/spread"), help="folder; the same command continues")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    metric_rows = rows(measure(args.sets, args.results))
    print(table(metric_rows, args.sets))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "sets": args.sets, "rows": metric_rows}, indent=1) + "\n")
