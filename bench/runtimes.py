"""Compare the time of an image in torch, ONNX Runtime and OpenVINO, in each precision, on this machine's CPU.

    pip install 'wadi-onestep[onnx,openvino]'
    python bench/runtimes.py --exports runs/runtimes --json runtimes.json

The embedded student is exported into the folder ``--exports``; exports that are there already are used again. Every variant
generates the same prompt once in each round, in shuffled order, so a busy machine slows all of them. The output is the median
and the middle half of the rounds, and each variant's largest difference to torch's image in float32, from the same noise.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

import wadi
from machine import machine
from wadi import sampling
from wadi.backbones import from_pipeline
from wadi.exports.source import Source, plain_call
from wadi.exports.write import Settings, export
from wadi.exports.written import difference
from wadi.io import markdown
from wadi.pipelines.generate import Sampling, generate_images
from wadi.runtime.run import Student
from wadi.zoo.prompts import fixed_prompts

PRECISIONS = ("float32", "float16", "int8")
SEED = 0


def variants(exports: Path, threads: int) -> dict[str, Callable[[], Image.Image]]:
    """Return functions that generate one image from the same noise, by the name of the variant."""
    prompt = fixed_prompts()[0]
    pipeline = wadi.load()
    call, steps = plain_call(pipeline)
    noise = [eps.numpy() for eps in sampling.noises(from_pipeline(pipeline), [SEED], steps)]
    found = {"torch float32": lambda: generate_images(pipeline, [prompt], [SEED], Sampling(steps, call=call)).images[0]}
    for to in ("onnx", "openvino"):
        for precision in PRECISIONS:
            folder = exports / f"{to}-{precision}"
            if not folder.exists():
                export(Source(images=1), to, folder, Settings(precision=precision))
            choices = (False, True) if to == "openvino" else (False,)
            for fast in choices:
                student = Student(folder, threads=threads, fast=fast)
                name = f"{to} {precision}{' --fast' if fast else ''}"
                found[name] = lambda student=student: student.generate([prompt], noise=noise)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exports", type=Path, required=True, help="folder for the exports")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every variant")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    functions = variants(options.exports, options.threads)
    images = {name: function() for name, function in functions.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(options.rounds):
        for name in order.sample(list(functions), len(functions)):
            begin = time.perf_counter()
            functions[name]()
            times[name].append(1000 * (time.perf_counter() - begin))
    rows = []
    for name, measured in times.items():
        first, middle, third = statistics.quantiles(measured, n=4, method="inclusive")
        check = difference([images["torch float32"]], [images[name]])
        rows.append({"variant": name, "median_ms": middle, "quartiles_ms": [first, third], "largest_difference": check.largest})
    table = [
        (row["variant"], f"{row['median_ms']:.1f}", "{:.1f} to {:.1f}".format(*row["quartiles_ms"]), row["largest_difference"])
        for row in rows
    ]
    print(markdown.table(("variant", "median, ms", "middle half, ms", "largest difference of 255"), table))
    packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "openvino"))
    where = f"{machine()}, {packages}; {options.rounds} rounds"
    print(where)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
