"""Images with prompts for objectives that need some: the teacher's samples of the warm-start pairs, or real images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.distill.conditions import Conditions
from wadi.distill.run_folder import REAL_IMAGES, Run
from wadi.distill.warm_start import Pairs
from wadi.errors import WadiError
from wadi.io.files import write_whole
from wadi.io.image_folders import image_paths, read_fitted, to_tensor
from wadi.io.progress import progress
from wadi.io.records import parse_json
from wadi.io.regular import read_text
from wadi.io.tensors import read_with_metadata
from wadi.io.weight_checks import check_finite, check_floats

BATCH = 4


@dataclass(frozen=True)
class Samples:
    """Samples as latents.

    Attributes:
        x0: ``(M, C, H, W)``, float32, on the CPU.
        conditions: function from row numbers to the condition of their prompts, on the network's device.
    """

    x0: Tensor
    conditions: Callable[[Tensor], Condition]


def samples_of_pairs(pairs: Pairs, conditions: Conditions) -> Samples:
    """Return the teacher's samples among the warm-start pairs."""
    return Samples(pairs.x0, lambda rows: conditions(pairs.rows[rows]))


def samples_of_folder(folder: Path, conditions: Conditions, run: Run) -> Samples:
    """Return the images of ``folder`` (see `captioned_images`) as latents. Communicates.

    They are encoded once and stored in the run's folder, so a run continues with the same images.

    Raises:
        WadiError: if an image or its prompt is missing or cannot be read, or the stored latents are damaged.
    """
    backbone, path = conditions.backbone, run.folder / REAL_IMAGES
    if not run.ranks.on_first(path.exists):
        run.ranks.on_first(lambda: encode_folder(folder, backbone, path))
    remedy = "Delete the file; the same command makes it again."
    tensors, header = read_with_metadata(path, "Latents of real images", remedy)
    if "x0" not in tensors or "prompts" not in header:
        raise WadiError(f"Latents of real images {str(path)!r} are damaged: they need 'x0' and 'prompts'. {remedy}")
    prompts: list[str] = parse_json(header["prompts"], list[str], f"The prompts in {str(path)!r}", remedy)
    expected, found = (len(prompts), *backbone.latent_shape), tuple(tensors["x0"].shape)
    if found != expected or not prompts:
        raise WadiError(f"Latents of real images {str(path)!r} are damaged: shape {found} in place of {expected}. {remedy}")
    check_floats(f"Latents of real images {str(path)!r}", tensors)
    check_finite(f"Latents of real images {str(path)!r}", tensors)
    return Samples(tensors["x0"], lambda rows: backbone.encode([prompts[int(row)] for row in rows]))


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of ``folder`` with their prompts: that of ``cat.png`` is the text in ``cat.txt``.

    Raises:
        WadiError: if there is no image, or one has no text file, or an empty one.
    """
    captioned = []
    for path in image_paths(folder, "The folder of real images"):
        text = path.with_suffix(".txt")
        prompt = " ".join(read_text(text, 2**20, "Prompt of a real image").split()) if text.is_file() else ""
        if not prompt:
            raise WadiError(f"The real image {str(path)!r} has no prompt. Write it into {str(text)!r}.")
        captioned.append((path, prompt))
    return captioned


def encode_folder(folder: Path, backbone: Backbone, out: Path) -> None:
    """Write the latents of the images of ``folder``, and their prompts, to the safetensors file ``out``."""
    captioned, latents = captioned_images(folder), []
    with progress("real images", len(captioned)) as bar:
        for first in range(0, len(captioned), BATCH):
            images = [to_tensor(read_fitted(path, backbone.resolution)) for path, _ in captioned[first : first + BATCH]]
            latents.append(backbone.encode_images(torch.stack(images).to(backbone.device), BATCH).cpu())
            bar.advance(by=len(images))
    prompts = json.dumps([prompt for _, prompt in captioned])
    write_whole(out, save({"x0": torch.cat(latents).contiguous()}, {"prompts": prompts}))
