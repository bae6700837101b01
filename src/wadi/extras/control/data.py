"""The images that a ControlNet is trained on: the teacher generates them from its prompts, and edges are found in them.

No data set is needed. The images are stored in one safetensors file, so that a training generates them once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wadi.backbones import Backbone
from wadi.errors import WadiError
from wadi.extras.control.edges import edge_map
from wadi.io.files import write_whole
from wadi.io.progress import progress
from wadi.io.records import parse_json
from wadi.io.tensors import read_with_metadata
from wadi.sampling import decode_in_batches, many_steps, noise


@dataclass(frozen=True)
class TrainingImages:
    """``N`` images: ``latents (N, C, h, w)`` float16, ``edges (N, 1, H, W)`` booleans, and the prompt of each."""

    latents: Tensor
    edges: Tensor
    prompts: list[str]

    def conditions(self, rows: Tensor) -> Tensor:
        """Return the condition images ``(B, 3, H, W)`` in ``[0, 1]`` of these rows."""
        return self.edges[rows].float().expand(-1, 3, -1, -1)


def shuffled_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return ``count`` prompts in a random order. No prompt comes twice before all others have come once, and so on."""
    order = random.Random(f"control {seed}")
    shuffled: list[str] = []
    while len(shuffled) < count:
        shuffled += order.sample(list(prompts), len(prompts))
    return shuffled[:count]


@torch.no_grad()
def generate_images(
    backbone: Backbone, prompts: Sequence[str], seed: int, steps: int, guidance_scale: float, batch: int = 32
) -> TrainingImages:
    """Generate an image of each prompt with the teacher in many steps. Image ``i`` starts from noise of seed ``seed + i``."""
    latents, edges = [], []
    null = backbone.encode([""])
    with progress("generating training images", len(prompts)) as bar:
        for first in range(0, len(prompts), batch):
            part = list(prompts[first : first + batch])
            z = noise(backbone.latent_shape, range(seed + first, seed + first + len(part))).to(backbone.device)
            x0 = many_steps(backbone, backbone.encode(part), null, z, steps, guidance_scale)
            latents.append(x0.half().cpu())
            edges.append(edge_map(decode_in_batches(backbone, x0)))
            bar.advance(by=len(part))
    return TrainingImages(torch.cat(latents), torch.cat(edges), list(prompts))


def save_images(path: Path, images: TrainingImages, note: str) -> None:
    """Write the images and a ``note`` of the settings that they were generated with, completely or not at all."""
    from safetensors.torch import save

    tensors = {"latents": images.latents.contiguous(), "edges": images.edges.to(torch.uint8).contiguous()}
    write_whole(path, save(tensors, {"note": note, "prompts": json.dumps(images.prompts)}))


def load_images(path: Path, notes: Sequence[str], prompts: Sequence[str]) -> TrainingImages | None:
    """Return the images that were saved with one of ``notes`` and these ``prompts`` in this order; None without a file.

    Raises:
        WadiError: if the file is damaged, or its images were generated with other settings or prompts.
    """
    if not path.is_file():
        return None
    tensors, metadata = read_with_metadata(path, "The file", "Delete it to generate the images again.")
    remedy = "Restore the teacher, prompts and settings of before, delete the file, or choose another --out."
    if metadata.get("note") not in notes:
        raise WadiError(
            f"{str(path)!r} contains images made with other settings ({metadata.get('note')}; now {notes[0]}). {remedy}"
        )
    try:
        stored_prompts = parse_json(metadata.get("prompts", "null"), list[str], f"The list of prompts in {str(path)!r}")
        images = TrainingImages(tensors["latents"], tensors["edges"].bool(), stored_prompts)
        if not len(images.latents) == len(images.edges) == len(stored_prompts):
            raise ValueError("numbers of latents, edges and prompts differ")
    except (KeyError, TypeError, ValueError) as error:
        raise WadiError(f"{str(path)!r} is damaged ({error}). Delete it to generate the images again.") from error
    if len(stored_prompts) != len(prompts):
        raise WadiError(f"{str(path)!r} contains {len(stored_prompts)} images, and {len(prompts)} are needed. {remedy}")
    for now, then in zip(prompts, stored_prompts, strict=True):
        if now != then:
            raise WadiError(f"{str(path)!r} contains images of other prompts: {then!r:.80}, and now {now!r:.80}. {remedy}")
    return images
