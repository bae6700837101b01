"""Stage 2 of the recipe: the autoencoder, from ``(3, 64, 64)`` images to ``(12, 16, 16)`` latents and back.

It learns from every usable icon of the three sets, in random poses. Every ``HOLD_OUT``-th icon (in all its styles) that is not
a candidate for a concept is held out to measure it. Latents carry a little noise during training, relative to each channel's
spread. The noise limits the information in a channel and makes the decoder robust to small errors. At export the mean and
spread of each channel are folded into the 1 x 1 convolutions around the latent, exactly, so that ``scaling_factor`` is 1 and
latents have zero mean and unit variance in each channel.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wadi.zoo.concepts import CANDIDATES
from wadi.zoo.recipe.compose import compose, random_pose
from wadi.zoo.recipe.icons import Sprites
from wadi.zoo.recipe.optim import Muon, groups_of
from wadi.zoo.recipe.state import Average, Budget, resume_run, save_run

if TYPE_CHECKING:
    from wadi.zoo.recipe.config import ZooConfig

CHANNELS = 12
NOISE = 0.04  # standard deviation of the latent noise, as a share of each channel's own
HOLD_OUT = 14
FOLDED_FROM = 1024  # compositions whose latents are standardised


def build_autoencoder() -> Any:
    """Return an untrained ``AutoencoderKL`` with 1.4 M parameters that reduces sides by 4.

    It has no attention, so it is fully convolutional.
    """
    from diffusers import AutoencoderKL

    ae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return ae.to(memory_format=torch.channels_last)


def split(sprites: Sprites) -> tuple[Tensor, Tensor]:
    """Return the indices of the sprites to learn from, and of the held-out ones.

    No held-out sprite is a candidate for a concept.
    """
    others = sorted(set(sprites.icons) - set(CANDIDATES.values()))
    held = set(others[::HOLD_OUT])
    mask = torch.tensor([icon in held for icon in sprites.icons])
    return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]


def encode(ae: Any, images: Tensor) -> Tensor:
    """Return the mean latent ``(B, 12, 16, 16)`` of images ``(B, 3, 64, 64)`` in [0, 1]."""
    x = (2 * images - 1).contiguous(memory_format=torch.channels_last)
    return ae.encode(x).latent_dist.mode()


def decode(ae: Any, latents: Tensor) -> Tensor:
    """Return images in [-1, 1], not clamped."""
    return ae.decode(latents.contiguous(memory_format=torch.channels_last)).sample


def psnr(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the mean of the images' PSNR, and the PSNR of their mean squared error, in dB. Images are in [0, 1]."""
    mse = (a.clamp(0, 1) - b).square().flatten(1).mean(1)
    return float(-10 * mse.log10().mean()), float(-10 * mse.mean().log10())


@torch.no_grad()
def reconstruction_psnr(ae: Any, images: Tensor) -> tuple[float, float, Tensor]:
    """Return `psnr` of the round trip, and its images in [0, 1]."""
    out = torch.cat([(decode(ae, encode(ae, part)) + 1) / 2 for part in images.split(32)]).clamp(0, 1)
    return *psnr(out, images), out


def held_out_images(sprites: Sprites, index: Tensor, seed: int = 7) -> Tensor:
    """Return one composition of each sprite in ``index``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return compose(sprites.pixels[index], random_pose(len(index), generator))


def reconstruction_loss(ae: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``mean |e| + 4 mean e^2`` of the round trip through noisy latents, with images scaled to [-1, 1]."""
    z = encode(ae, images)
    spread = z.detach().std(dim=(0, 2, 3), keepdim=True)
    z = z + NOISE * spread * torch.randn(z.shape, generator=generator)
    error = decode(ae, z) - (2 * images - 1)
    return error.abs().mean() + 4 * error.square().mean()


@torch.no_grad()
def fold(ae: Any, latents: Tensor) -> None:
    """Give ``ae``'s latents zero mean and unit variance in each channel, as measured on ``latents (N, C, H, W)``."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = ae.quant_conv, ae.post_quant_conv
    post.bias.add_(post.weight[:, :, 0, 0] @ mean)  # first, from the weight before it is scaled
    post.weight.mul_(std[None, :, None, None])
    quant.weight[:CHANNELS].div_(std[:, None, None, None])
    quant.bias[:CHANNELS].sub_(mean).div_(std)
    quant.weight[CHANNELS:].zero_()  # the posterior's log variance: the constant noise it was trained with
    quant.bias[CHANNELS:].fill_(2 * math.log(NOISE))


def train_autoencoder(config: ZooConfig, sprites: Sprites, out: Path) -> Any:
    """Train for ``config.minutes_autoencoder``, resuming from ``out``. Return the folded average of the weights."""
    from wadi.zoo.recipe.report import log, save_grid

    torch.manual_seed(config.seed)
    ae, path = build_autoencoder(), out / "autoencoder.safetensors"
    optimiser = Muon(groups_of(ae, config.lr_autoencoder, 1e-3), lr=config.lr_autoencoder)
    average = Average(ae, 0.998)
    note = resume_run(path, ae, optimiser, average) or {"elapsed": 0.0, "step": 0}
    budget, step = Budget(config.minutes_autoencoder, note["elapsed"]), note["step"]
    generator = torch.Generator().manual_seed(config.seed + step)
    learn, held = split(sprites)
    fixed = held_out_images(sprites, held)
    shown = build_autoencoder()
    with log(out / "autoencoder.jsonl", "autoencoder", budget) as lines:
        while budget.fraction < 1:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * budget.rate()
            index = learn[torch.randint(len(learn), (config.batch_autoencoder,), generator=generator)]
            images = compose(sprites.pixels[index], random_pose(len(index), generator))
            loss = reconstruction_loss(ae, images, generator)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(ae)
            step += 1
            lines.step(loss.item(), len(index))
            if step % 250 == 0 or budget.fraction >= 1:
                shown.load_state_dict(ae.state_dict())
                average.copy_to(shown)
                each, overall, decoded = reconstruction_psnr(shown, fixed)
                lines.write(step=step, psnr_each=each, psnr_mean=overall, held_out=len(held))
                save_grid(out / "autoencoder.png", torch.stack([fixed[:48], decoded[:48]], 1).flatten(0, 1), columns=16)
                save_run(path, ae, optimiser, average, elapsed=budget.elapsed, step=step)
    average.copy_to(ae)
    ae.eval().requires_grad_(False)
    fold(ae, torch.cat([encode(ae, x) for x in _compositions(sprites, learn, generator)]))
    return ae


def _compositions(sprites: Sprites, learn: Tensor, generator: torch.Generator) -> list[Tensor]:
    index = learn[torch.randint(len(learn), (FOLDED_FROM,), generator=generator)]
    return [compose(sprites.pixels[i], random_pose(len(i), generator)) for i in index.split(64)]
