"""Edges of one picture, and one-step pictures that follow them: ``python examples/control.py [OUT.png]``.

The embedded student draws a picture, Canny's edges of it become the condition, and other prompts are drawn into the same
outline at several strengths. Takes some seconds on a CPU; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import wadi.pipelines.generate
from wadi.extras.control.conditions import canny
from wadi.extras.control.pipeline import control_arguments, with_control
from wadi.io import grids

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
PROMPTS = ["red apple, on a white background", "pizza, on a blue background", "basketball, on a green background"]


def main(out: Path) -> None:
    student = wadi.pipelines.generate.load()  # an ordinary StableDiffusionPipeline that draws in one step
    source = wadi.pipelines.generate.draw(student, ["tomato, on a grey background"], [3]).pictures[0]
    edges = canny(source)
    pipeline = with_control(student, "zoo")  # an ordinary StableDiffusionControlNetPipeline
    rows = []
    for strength in STRENGTHS:
        more = control_arguments(pipeline, edges, strength)
        rows.append(wadi.pipelines.generate.draw(pipeline, PROMPTS, [11, 12, 13], call=more).pictures)
    labels = [f"strength {strength:g}" for strength in STRENGTHS]
    grids.save_png(grids.compose_grid([[source, edges, edges], *rows], ["source, edges", *labels], PROMPTS, 2), out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "control.png"))
