"""What exports for ONNX Runtime and OpenVINO have in common: the student's settings, its tokenizers, a runner without torch.

The runner is a copy of `wadi.runtime.run`. It is checked in a process of its own, in which torch, diffusers, transformers and
this package cannot be imported. torch and numpy draw other noise from the same seed, so the check gives it the student's noise.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from wadi import sampling
from wadi.backbones import Backbone, from_pipeline
from wadi.errors import WadiError, first_line
from wadi.exports.graphs import MOST_IMAGES, Graph, trace
from wadi.exports.prompt_inputs import HOLDS_ALL, PromptInputs, read_prompt_inputs
from wadi.exports.source import Source, plain_call
from wadi.exports.written import Written
from wadi.io.images import read_image
from wadi.io.quiet import errors_only
from wadi.io.wording import counted
from wadi.runtime import RUNNER, SETTINGS

Precision = Literal["float32", "float16", "int8"]

# Runs the export's own run.py as on a machine that has none of these packages.
ALONE = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "wadi"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
folder, work = sys.argv[1:]
sys.path.insert(0, folder)
sys.dont_write_bytecode = True
import json
import numpy as np
from run import Student

with open(work + "/prompts.json", encoding="utf-8") as stream:
    prompts = json.load(stream)
with np.load(work + "/noise.npz") as noise:
    images = Student(folder).generate(prompts, noise=[noise[f"arr_{i}"] for i in range(len(noise))])
for i, image in enumerate(images):
    image.save(f"{work}/{i}.png")
assert "torch" not in sys.modules
"""


@dataclass(frozen=True)
class Runtime:
    """A program that runs the graphs.

    Attributes:
        name: as in ``--to``.
        title: its own name.
        package: what users install.
        suffix: of a graph's file.
        traced_dtypes: dtype in which the student is traced, for each precision.
        write_graph: writes one graph into a file, in a precision.
    """

    name: str
    title: str
    package: str
    suffix: str
    traced_dtypes: dict[Precision, torch.dtype]
    write_graph: Callable[[Graph, Path, Precision], None]


def precision_of(name: str) -> Precision:
    """Return the precision of that name.

    Raises:
        WadiError: if there is none.
    """
    for precision in get_args(Precision):
        if precision == name:
            return precision
    raise WadiError(f"--dtype is {name!r}. With --to onnx or openvino, use {', '.join(get_args(Precision))}.")


def write(source: Source, folder: Path, precision: Precision, runtime: Runtime) -> Written:
    """Write the student into ``folder``.

    Raises:
        WadiError: if the student cannot be traced, or the runtime cannot hold or run it.
    """
    cpu = replace(source, device="cpu")
    pipeline = cpu.pipeline(torch.float32)
    call, steps = plain_call(pipeline)
    reference = source.draw(pipeline.to(torch.device(source.device)), call, steps)
    prompts, seeds = source.requests()
    noise = [eps.numpy() for eps in sampling.noises(from_pipeline(pipeline), seeds, steps)]
    dtype = runtime.traced_dtypes[precision]
    with errors_only():  # diffusers warns that it cannot run float16 on a CPU; it is only traced
        backbone = from_pipeline(pipeline.to(torch.device("cpu")) if dtype == torch.float32 else cpu.pipeline(dtype))
    parts = read_prompt_inputs(backbone)
    graphs = trace(backbone, parts)
    for name, graph in graphs.items():
        _write_graph(name, graph, folder, precision, runtime)
    for part in parts:
        (folder / f"{part.component}.json").write_text(part.file, encoding="utf-8")
    settings = _settings(backbone, parts, graphs, precision, runtime)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(RUNNER, folder / RUNNER.name)
    height, width = backbone.resolution
    return Written(
        title=f"{runtime.title} files of a student that generates in {counted(steps, 'step')}",
        reference=reference,
        read=lambda: read(folder, prompts, noise, runtime),
        reader=f"`{RUNNER.name}`, with {runtime.title} and without torch,",
        code=(
            f"import sys\n\nsys.path.insert(0, FOLDER)  # this folder, with {RUNNER.name}\nfrom run import Student\n\n"
            "image = Student().generate([prompt], seeds=[0])[0]\n"
        ),
        sections=[
            f"It needs no torch: `pip install {runtime.package} numpy pillow tokenizers`. From the command line: "
            f'`python {RUNNER.name} "a prompt" --out images`. Images have {height} x {width} pixels (height x width), and the '
            f"weights are {precision}.",
            "The runner draws noise with numpy, so a seed gives another image than in torch. For the check, both started from "
            "the same noise.",
        ],
        summary=f"python FOLDER/{RUNNER.name} PROMPT (needs {runtime.package}, numpy, pillow, tokenizers)",
        data={"steps": steps, "call": call, "precision": precision, "resolution": [height, width]},
        library=runtime.name,
    )


@torch.no_grad()  # with gradients, torch takes attention apart in a way that it cannot convert
def _write_graph(name: str, graph: Graph, folder: Path, precision: Precision, runtime: Runtime) -> None:
    try:
        runtime.write_graph(graph, folder / f"{name}{runtime.suffix}", precision)
    except OSError:  # a full disk
        raise
    except Exception as error:  # each converter has its own, for an operator that it does not know
        raise WadiError(
            f"{runtime.title} cannot write the student's {name} as {precision}: {type(error).__name__}: "
            f"{first_line(error)[:200]}. Nothing was written. {HOLDS_ALL}"
        ) from error


def _settings(
    backbone: Backbone, parts: list[PromptInputs], graphs: dict[str, Graph], precision: Precision, runtime: Runtime
) -> dict[str, Any]:
    """Return the contents of ``student.json``: what `wadi.runtime.run` needs besides graphs and tokenizers."""
    timesteps = torch.tensor(backbone.student_timesteps)
    return {
        "format": runtime.name,
        "precision": precision,
        "resolution": list(backbone.resolution),
        "latent_shape": list(backbone.latent_shape),
        "most_images": MOST_IMAGES,
        "prediction": backbone.process.prediction,
        "timesteps": timesteps.tolist(),
        "alphas": backbone.process.alpha(timesteps).tolist(),
        "sigmas": backbone.process.sigma(timesteps).tolist(),
        "rounds_latents": backbone.network.dtype == torch.float16,
        "tokenizers": [
            {"file": f"{part.component}.json", "prefix": part.prefix, "lower": part.lower, "ids": part.ids, "mask": part.mask}
            for part in parts
        ],
        "graphs": {
            name: {"file": f"{name}{runtime.suffix}", "inputs": graph.inputs, "outputs": graph.outputs}
            for name, graph in graphs.items()
        },
    }


def read(folder: Path, prompts: list[str], noise: list[np.ndarray], runtime: Runtime) -> list[Image.Image]:
    """Return the images of an export's own runner in another process, for the given noise of each timestep.

    Raises:
        WadiError: if it fails.
    """
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        np.savez(Path(work) / "noise.npz", *noise)
        command = [sys.executable, "-W", "ignore", "-c", ALONE, str(folder), work]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise WadiError(
                f"{runtime.title} cannot run the exported student: {last[:300].rstrip('.')}. Nothing was written. {HOLDS_ALL}"
            )
        return [read_image(Path(work) / f"{i}.png") for i in range(len(prompts))]
