"""What customisation learns from: a folder of pictures as latents, and pictures of the class that the model draws itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wadi.backbones import Backbone, Condition
from wadi.diffusion.schedulers import timestep_of
from wadi.errors import WadiError
from wadi.io.images import HEIC, SUFFIXES, read_image
from wadi.io.regular import is_dir, shown, unreadable
from wadi.sampling import many_steps, noise, one_step


@dataclass(frozen=True)
class Prior:
    """What the model drew before: latents ``x0`` ``(M, C, H, W)`` of noise ``z``, and the condition of each."""

    z: Tensor
    x0: Tensor
    condition: Condition


def pictures_in(folder: Path) -> list[Path]:
    """Return the images of ``folder`` by name; other files are left out.

    Raises:
        WadiError: if there is no such folder, it cannot be read, it has no image, or one is HEIC, as phones write it.
    """
    if not is_dir(folder):
        raise WadiError(f"The subject {shown(folder)} is not a folder. Give a folder with a few images of one subject.")
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error, "Subject's folder") from error
    if unread := next((path for path in files if path.suffix.lower() in HEIC), None):
        raise WadiError(f"The subject's image {shown(unread)} is HEIC, which is not read. Convert it to JPEG, or take it out.")
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        raise WadiError(
            f"The subject's folder {shown(folder)} has no image. Put a few there, with names that end in {', '.join(SUFFIXES)}."
        )
    return found


def check_subject(folder: Path) -> None:
    """Raise `WadiError` as `read_subject` does, before a model is loaded."""
    for path in pictures_in(folder):
        read_image(path)


def read_subject(folder: Path, resolution: tuple[int, int]) -> tuple[Tensor, list[Image.Image]]:
    """The subject's pictures ``(N, 3, height, width)`` in [0, 1], and as pictures; the middle is cut out.

    Raises:
        WadiError: if there is none, or one cannot be read (which).
    """
    pictures = [_fit(read_image(path), resolution) for path in pictures_in(folder)]
    return torch.stack([_tensor(picture) for picture in pictures]), pictures


def _fit(picture: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    from PIL import ImageOps

    height, width = resolution
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _tensor(picture: Image.Image) -> Tensor:
    height, width = picture.height, picture.width
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1) / 255


@torch.no_grad()
def draw_prior(
    backbone: Backbone, prompts: Sequence[str], count: int, seed: int, steps: int, guidance_scale: float, batch: int = 32
) -> Prior:
    """``count`` latents of ``prompts`` in turn, as the model draws them now: in ``steps``, or for 0 in a student's one step."""
    wanted = [prompts[i % len(prompts)] for i in range(count)]
    z = noise(backbone.latent_shape, range(seed, seed + count)).to(backbone.device)
    condition, null, made = backbone.encode(wanted), backbone.encode([""]), []
    for rows in torch.arange(count).split(batch):
        if steps:
            made.append(many_steps(backbone, condition[rows], null, z[rows], steps, guidance_scale))
        else:
            made.append(one_step(backbone, condition[rows], z[rows], timestep_of(backbone.pipeline.scheduler)))
    return Prior(z, torch.cat(made), condition)
