"""What a ControlNet learns from when there is no data: pictures that the teacher draws of its prompts, and their edges."""

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
from wadi.extras.control.conditions import edge_map
from wadi.io.files import write_whole
from wadi.io.progress import progress
from wadi.io.records import parse_json
from wadi.io.regular import require_file
from wadi.sampling import decode_in_batches, many_steps, noise


@dataclass(frozen=True)
class Pictures:
    """``N`` pictures: ``latents (N, C, h, w)`` float16, ``edges (N, 1, H, W)`` booleans, ``prompts`` of each."""

    latents: Tensor
    edges: Tensor
    prompts: list[str]

    def conditions(self, rows: Tensor) -> Tensor:
        """Condition images ``(B, 3, H, W)`` in ``[0, 1]`` of these rows."""
        return self.edges[rows].float().expand(-1, 3, -1, -1)


def chosen_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` prompts in a random order, each as often as the others."""
    order = random.Random(f"control {seed}")
    found: list[str] = []
    while len(found) < count:
        found += order.sample(list(prompts), len(prompts))
    return found[:count]


@torch.no_grad()
def draw_pictures(
    backbone: Backbone, prompts: Sequence[str], seed: int, steps: int, guidance_scale: float, batch: int = 32
) -> Pictures:
    """The teacher's pictures of ``prompts``, in many steps, with their edges; picture ``i`` has noise of ``seed + i``."""
    latents, edges = [], []
    null = backbone.encode([""])
    with progress("drawing pictures to learn from", len(prompts)) as bar:
        for first in range(0, len(prompts), batch):
            part = list(prompts[first : first + batch])
            z = noise(backbone.latent_shape, range(seed + first, seed + first + len(part))).to(backbone.device)
            x0 = many_steps(backbone, backbone.encode(part), null, z, steps, guidance_scale)
            latents.append(x0.half().cpu())
            edges.append(edge_map(decode_in_batches(backbone, x0)))
            bar.advance(by=len(part))
    return Pictures(torch.cat(latents), torch.cat(edges), list(prompts))


def save(path: Path, pictures: Pictures, note: str) -> None:
    """Write pictures with what tells how they came about, whole or not at all."""
    from safetensors.torch import save as to_bytes

    tensors = {"latents": pictures.latents.contiguous(), "edges": pictures.edges.to(torch.uint8).contiguous()}
    write_whole(path, to_bytes(tensors, {"note": note, "prompts": json.dumps(pictures.prompts)}))


def load(path: Path, notes: Sequence[str], prompts: Sequence[str]) -> Pictures | None:
    """Images that were saved under one of ``notes`` and for the same ``prompts``, in this order; None if there are none.

    Raises:
        WadiError: if the file is damaged or was made with other settings or prompts.
    """
    if not path.is_file():
        return None
    tensors, about = stored(path, "draw anew")
    remedy = "Restore the teacher, prompts and settings of before, delete the file, or choose another --out."
    if about.get("note") not in notes:
        raise WadiError(
            f"{str(path)!r} contains images made with other settings ({about.get('note')}; now {notes[0]}). {remedy}"
        )
    try:
        own = parse_json(about.get("prompts", "null"), list[str], f"The list of prompts in {str(path)!r}")
        found = Pictures(tensors["latents"], tensors["edges"].bool(), own)
        if not len(found.latents) == len(found.edges) == len(own):
            raise ValueError("numbers of latents, edges and prompts differ")
    except (KeyError, TypeError, ValueError) as error:
        raise WadiError(f"{str(path)!r} is damaged ({error}). Delete it to draw anew.") from error
    for now, then in zip(prompts, own, strict=True) if len(prompts) == len(own) else ():
        if now != then:
            raise WadiError(f"{str(path)!r} contains images of other prompts: {then!r:.80}, and now {now!r:.80}. {remedy}")
    if len(own) != len(prompts):
        raise WadiError(f"{str(path)!r} contains {len(own)} images, and {len(prompts)} are needed. {remedy}")
    return found


def stored(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a safetensors file.

    Args:
        remedy: what deleting the file will do.
    Raises:
        WadiError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(require_file(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise WadiError(f"{str(path)!r} is damaged ({error}). Expected it as it was written: delete it to {remedy}.") from error
