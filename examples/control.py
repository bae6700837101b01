"""Generate one-step images that follow the edges of another image: ``python examples/control.py [OUT.png]``.

The embedded student generates an image, its edges become the condition, and images of other prompts are generated with the same
outline at several strengths. This takes some seconds on a CPU; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import wadi
from wadi.extras.control.conditions import canny
from wadi.extras.control.pipeline import control_arguments, with_control
from wadi.io import grids
from wadi.pipelines.generate import Sampling, generate_images

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
PROMPTS = ["red apple, on a white background", "pizza, on a blue background", "basketball, on a green background"]


def main(out: Path) -> None:
    student = wadi.load()  # an ordinary StableDiffusionPipeline that generates in one step
    source = generate_images(student, ["tomato, on a grey background"], [3]).images[0]
    edges = canny(source)
    pipeline = with_control(student, "zoo")  # an ordinary StableDiffusionControlNetPipeline
    rows = []
    for strength in STRENGTHS:
        more = control_arguments(pipeline, edges, strength)
        rows.append(generate_images(pipeline, PROMPTS, [11, 12, 13], Sampling(call=more)).images)
    labels = [f"strength {strength:g}" for strength in STRENGTHS]
    grids.save_png(grids.compose_grid([[source, edges, edges], *rows], ["source, edges", *labels], PROMPTS, 2), out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "control.png"))
