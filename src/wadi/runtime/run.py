"""Generate images with the student in this folder. torch, diffusers and wadi are not needed.

    pip install numpy pillow tokenizers onnxruntime      # for an OpenVINO export: openvino in place of onnxruntime
    python run.py "a red apple" "a green pear" --seed 1 --out images

`Student` does the same from Python. Symbols: latents ``x_t = alpha_t x0 + sigma_t eps`` of shape ``(B, C, H, W)``, the image
``x0``, noise ``eps``, number of images ``B``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

SETTINGS = "student.json"
SEEDS = 2**63


class Student:
    """A text-to-image student of one or a few steps, in ONNX Runtime or OpenVINO.

    Args:
        folder: the export; default: the folder of this file.
        device: where to compute. OpenVINO: ``CPU``, ``GPU``, ``AUTO``, ... ONNX Runtime: the name of an execution provider
            without ``ExecutionProvider``, such as ``CPU``, ``CUDA``, ``CoreML``.
        threads: number of CPU threads; default: the library's choice.
        fast: OpenVINO only: compute in the type that the device prefers, such as bfloat16, and not in float32. Images change.
    Raises:
        OSError: if a file cannot be read.
        ValueError: if the device does not exist, or ``student.json`` is damaged.
    """

    def __init__(
        self, folder: str | Path | None = None, device: str = "CPU", threads: int | None = None, fast: bool = False
    ) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        self.tokenizers = [Tokenizer.from_file(str(self.folder / part["file"])) for part in self.settings["tokenizers"]]
        open_graph = {"onnx": _open_onnx, "openvino": _open_openvino}[self.settings["format"]]
        self._graphs = {}
        for name, graph in self.settings["graphs"].items():
            if not (self.folder / graph["file"]).is_file():
                raise FileNotFoundError(f"{str(self.folder)!r} has no {graph['file']}. Copy the whole folder of the export.")
            self._graphs[name] = open_graph(self.folder / graph["file"], device, threads, fast)

    @property
    def timesteps(self) -> list[int]:
        """The timesteps at which the student generates, the noisiest first."""
        return list(self.settings["timesteps"])

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of an image in pixels."""
        height, width = self.settings["resolution"]
        return height, width

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        noise: Sequence[np.ndarray] | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 4,
    ) -> list[Image.Image]:
        """Return one image for each prompt.

        Args:
            seeds: one for each prompt, from 0 to 2^63 - 1; default 0, 1, 2, ... An image depends on its own seed and prompt.
            noise: the noise of each timestep, ``(len(prompts), C, H, W)`` float32 each, in place of seeds.
            size: ``(height, width)`` in pixels. The files hold one size; another one is an error.
            batch: images at a time. It changes memory and speed.
        Raises:
            ValueError: if an argument is out of range, or an image has NaN or infinity.
        """
        if size is not None and tuple(size) != self.size:
            raise ValueError(
                f"The size is {size[0]} x {size[1]}. These files hold {self.size[0]} x {self.size[1]} (height x width): leave "
                "the size out, or export the student at another size."
            )
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"The prompts are {prompts!r}. Give a list of at least one prompt.")
        most = self.settings["most_images"]
        if not 1 <= batch <= most:
            raise ValueError(f"batch is {batch}. It must be from 1 to {most}.")
        if noise is None:
            seeds = range(len(prompts)) if seeds is None else seeds
            if len(seeds) != len(prompts):
                raise ValueError(f"There are {len(prompts)} prompts and {len(seeds)} seeds. Give one seed for each prompt.")
            noise = self.noise(seeds)
        shape = (len(prompts), *self.settings["latent_shape"])
        if [np.shape(eps) for eps in noise] != [shape] * len(self.timesteps):
            raise ValueError(
                f"The noise has the shapes {[np.shape(eps) for eps in noise]}. Give {len(self.timesteps)} arrays of {shape}."
            )
        images: list[Image.Image] = []
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            x0 = self.latents(self.encode(prompts[part]), [np.asarray(eps[part], np.float32) for eps in noise])
            images += self.decode(x0)
        return images

    def noise(self, seeds: Sequence[int]) -> list[np.ndarray]:
        """Return noise ``N(0, 1)`` for each timestep, ``(len(seeds), C, H, W)`` float32 each.

        Raises:
            ValueError: if a seed is out of range.
        """
        if wrong := [seed for seed in seeds if not 0 <= seed < SEEDS]:
            raise ValueError(f"The seed is {wrong[0]}. It must be from 0 to 2^63 - 1.")
        generators = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        shape = self.settings["latent_shape"]
        return [np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]) for _ in self.timesteps]

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the network's inputs that come from the prompts, with one row for each prompt."""
        rows = [self._run("text", self.tokenize(prompt)) for prompt in prompts]
        return {name: np.concatenate([row[name] for row in rows]) for name in self.settings["graphs"]["text"]["outputs"]}

    def tokenize(self, prompt: str) -> dict[str, np.ndarray]:
        """Return the inputs of the text encoders, ``(1, tokens)`` int64 each."""
        inputs = {}
        for tokenizer, part in zip(self.tokenizers, self.settings["tokenizers"], strict=True):
            text = part["prefix"] + (prompt.lower().strip() if part["lower"] else prompt)
            encoding = tokenizer.encode(text)
            if encoding.overflowing:
                warnings.warn(
                    f"The prompt {prompt[:60]!r} is longer than the text encoder reads. Its end is cut.", stacklevel=3
                )
            for name, values in ((part["ids"], encoding.ids), (part["mask"], encoding.attention_mask)):
                if name is not None:
                    inputs[name] = np.array([values], np.int64)
        return inputs

    def latents(self, condition: Mapping[str, np.ndarray], noise: Sequence[np.ndarray]) -> np.ndarray:
        """Return ``x0`` ``(B, C, H, W)``: predict, and at each further timestep add noise and predict again."""
        x0 = np.zeros_like(noise[0])
        for i, (timestep, eps) in enumerate(zip(self.timesteps, noise, strict=True)):
            alpha, sigma = (np.float32(self.settings[name][i]) for name in ("alphas", "sigmas"))
            x_t = eps if i == 0 else alpha * x0 + sigma * eps
            if self.settings["rounds_latents"]:  # the network sees float16, and x0 must be computed from what it sees
                x_t = x_t.astype(np.float16).astype(np.float32)
            t = np.full(len(x_t), timestep, np.int64)
            prediction = self._run("network", {"x_t": x_t, "t": t, **condition})["prediction"]
            x0 = _image_of(prediction, x_t, alpha, sigma, self.settings["prediction"])
        return x0

    def decode(self, x0: np.ndarray) -> list[Image.Image]:
        """Return images of latents ``(B, C, H, W)``.

        Raises:
            ValueError: if an image has NaN or infinity.
        """
        pixels = self._run("decoder", {"latents": x0})["images"]
        if not np.isfinite(pixels).all():
            raise ValueError("The decoder returned NaN or infinity. Export the student as float32.")
        return [Image.fromarray(image) for image in np.rint(255 * pixels.transpose(0, 2, 3, 1)).astype(np.uint8)]

    def _run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        graph = self.settings["graphs"][name]
        values = self._graphs[name]({key: inputs[key] for key in graph["inputs"]})
        return dict(zip(graph["outputs"], values, strict=True))


def _image_of(prediction: np.ndarray, x_t: np.ndarray, alpha: np.float32, sigma: np.float32, kind: str) -> np.ndarray:
    """Return ``x0`` of the network's prediction at ``x_t``."""
    if kind == "epsilon":  # eps
        return (x_t - sigma * prediction) / alpha
    if kind == "sample":  # x0
        return prediction
    if kind == "v_prediction":  # alpha eps - sigma x0
        return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
    if kind == "velocity":  # eps - x0
        return (x_t - sigma * prediction) / (alpha + sigma)
    raise ValueError(f"{SETTINGS} has the prediction {kind!r}, which this file does not know.")


def _open_onnx(path: Path, device: str, threads: int | None, fast: bool) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # no usage data
    import onnxruntime

    provider = f"{device}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
        raise ValueError(f"This ONNX Runtime has no device {device!r}. It has {', '.join(names)}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about what its optimiser could not simplify
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(
        str(path), options, providers=list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    )
    return lambda inputs: session.run(None, dict(inputs))


def _open_openvino(path: Path, device: str, threads: int | None, fast: bool) -> Any:
    import openvino

    core = openvino.Core()
    if device.partition(":")[0] not in ("AUTO", *core.available_devices):
        raise ValueError(f"This OpenVINO has no device {device!r}. It has AUTO, {', '.join(core.available_devices)}.")
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    if not fast:
        config["INFERENCE_PRECISION_HINT"] = "f32"
    model = core.compile_model(str(path), device, config)
    return lambda inputs: list(model(dict(inputs)).to_tuple())


def main(argv: Sequence[str] | None = None) -> int:
    """Generate the images of a command line."""
    parser = argparse.ArgumentParser(description="Generate images with the student in this folder.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what the images show")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; each further one has the next seed (default 0)"
    )
    parser.add_argument("--count", type=int, default=1, help="images of each prompt (default 1)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--size", type=_size, default=None, help="HEIGHTxWIDTH in pixels; only the size of the export works")
    parser.add_argument(
        "--device", default="CPU", help="CPU (default), or GPU, AUTO (OpenVINO), CUDA, CoreML (ONNX Runtime), ..."
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: the library's choice")
    parser.add_argument("--fast", action="store_true", help="OpenVINO: compute in the device's own type, such as bfloat16")
    parser.add_argument("--out", type=Path, default=Path("images"), help="new folder for the images (default images)")
    options = parser.parse_args(argv)
    try:
        if options.count < 1:
            raise ValueError(f"--count is {options.count}. It must be at least 1.")
        prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
        seeds = [options.seed + i for i in range(len(prompts))]
        if options.out.exists():
            raise ValueError(f"--out {str(options.out)!r} already exists. Choose a new folder.")
        student = Student(device=options.device, threads=options.threads, fast=options.fast)
        images = student.generate(prompts, seeds, size=options.size, batch=options.batch)
        options.out.mkdir(parents=True)
        for seed, image in zip(seeds, images, strict=True):
            image.save(options.out / f"{seed}.png")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(images)} images in {options.out}")
    return 0


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
