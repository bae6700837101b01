"""The U-Net teacher: `zoo`. Its images show one thing.

v-prediction on Stable Diffusion's ``scaled_linear`` schedule, which is well conditioned also at t = 999:

    x_t = alpha_t x_0 + sigma_t eps        v = alpha_t eps - sigma_t x_0        x_0 = alpha_t x_t - sigma_t v

The loss on v is weighted by ``min(1, (1 + GAMMA) / (1 + snr_t))``: full weight where the image is decided, less where only the
last noise remains. The pooled text is added to the time embedding (``addition_embed_type="text"``); without it a network of
this size follows prompts badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.prompts import fixed_prompts
from wadi.zoo.recipe import scenes, text
from wadi.zoo.recipe.autoencoder import CHANNELS, encode
from wadi.zoo.recipe.compose import Pose, compose, random_pose
from wadi.zoo.recipe.kinds import DROP, GAMMA, SIDE, Kind, fast_products, placed_like

SMALLEST = 0.66  # side of the smallest sprite, as a share of the image's
FOCUS = 0.5  # timesteps in the middle are (1 + FOCUS) / (1 - FOCUS) times as frequent as those at either end


class UNetTeacher(Kind):
    """``StableDiffusionPipeline`` with a ``UNet2DConditionModel`` and a ``CLIPTextModel``."""

    name, network, file = "unet", "unet", "teacher"
    text: ClassVar[Any] = text
    label_size = 3  # concept, style, colour
    minutes = 67.0
    guidance_scale, steps = 2.5, 25

    def build_network(self) -> Any:
        """See `Kind.build_network`."""
        return build_unet()

    def build_scheduler(self) -> Any:
        """See `Kind.build_scheduler`."""
        return build_scheduler()

    def assemble(self, ae: Any, model: nn.ModuleDict, tokenizer: Any) -> Any:
        """See `Kind.assemble`."""
        return assemble(ae, model["text_encoder"], tokenizer, model["unet"])

    def labels(self, count: int | None, generator: torch.Generator) -> Tensor:
        """See `Kind.labels`. The colour is drawn with the pose."""
        concepts, styles = len(CONCEPTS), len(STYLES)
        if count is None:
            index = torch.arange(concepts * styles)
        else:
            index = torch.randint(concepts * styles, (count,), generator=generator)
        return torch.stack([index // styles, index % styles, torch.zeros_like(index)], 1)

    def latents(self, ae: Any, sprites: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Kind.latents`."""
        return new_latents(ae, sprites, labels[:, 0], labels[:, 1], generator)

    def captions(self, labels: Tensor, generator: torch.Generator) -> list[str]:
        """See `Kind.captions`."""
        return draw_captions(labels, generator)

    def loss(
        self, model: nn.ModuleDict, tokenizer: Any, texts: Sequence[str], x0: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See `Kind.loss`."""
        with fast_products(x0.device):
            states = model["text_encoder"](text.tokenize(tokenizer, list(texts)).to(x0.device))[0].float()
        return v_loss(model["unet"], states, x0, self.alphas_cumprod, generator)

    def fixed_prompts(self) -> list[str]:
        """See `Kind.fixed_prompts`."""
        return fixed_prompts()


def build_unet(channels: tuple[int, ...] = (80, 128, 192)) -> Any:
    """Return an untrained ``UNet2DConditionModel`` on ``(12, 16, 16)`` latents."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=tuple(width // 32 for width in channels),  # diffusers reads this as the number of heads
        cross_attention_dim=text.HIDDEN,
        time_embedding_dim=256,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )
    return unet.to(memory_format=torch.channels_last)


def build_scheduler() -> Any:
    """Return the shipped DDIM scheduler: 1,000 steps, v-prediction, trailing spacing (sampling starts at t = 999)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # not used by trailing spacing; diffusers warns of any other value
        timestep_spacing="trailing",
    )


def assemble(ae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> Any:
    """Return the ``StableDiffusionPipeline`` of these parts, without a safety checker."""
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline(
        vae=ae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def new_latents(ae: Any, sprites: Tensor, concept: Tensor, style: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return latents and labels of new compositions, from ``sprites (concepts, styles, 4, S, S)``."""
    pose = random_pose(len(concept), generator, SMALLEST, mirror=False)
    rgb, theta = pose.rgb.to(sprites.device), pose.theta.to(sprites.device)
    images = compose(sprites[concept.to(sprites.device), style.to(sprites.device)], Pose(pose.colour, rgb, theta))
    return encode(ae, images), torch.stack([concept, style, pose.colour], 1)


def draw_captions(labels: Tensor, generator: torch.Generator) -> list[str]:
    """Return a caption for each row of labels ``(n, 3)``, see `scenes.captions`."""
    concept, style, colour = labels.unbind(1)
    return scenes.captions(torch.stack([concept, torch.full_like(concept, -1), style, colour], 1), generator, DROP)


def timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` timesteps below ``total``, ascending, spread over all of them and denser in the middle.

    ``t = total (u + FOCUS sin(2 pi u) / 2 pi)`` has the density ``1 / (1 + FOCUS cos(2 pi u))``. Near either end the image is
    already settled or cannot be guessed, and the loss there is mostly noise.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    warped = u + FOCUS * torch.sin(2 * torch.pi * u) / (2 * torch.pi)
    return (total * warped).long().clamp(0, total - 1)


def v_loss(unet: Any, states: Tensor, x0: Tensor, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weighted error of the predicted velocity of ``x0 (B, 12, 16, 16)`` at random timesteps."""
    t = timesteps(len(x0), len(alphas_cumprod), generator)
    t, power, noise = placed_like((t, alphas_cumprod[t], torch.randn(x0.shape, generator=generator)), x0)
    alpha, sigma = power.sqrt(), (1 - power).sqrt()
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    x_t = (a * x0 + s * noise).contiguous(memory_format=torch.channels_last)
    with fast_products(x0.device):
        v = unet(x_t, t, encoder_hidden_states=states).sample.float()
    weight = ((1 + GAMMA) * sigma.square()).clamp(max=1.0)  # 1 / (1 + snr) is sigma^2
    return (weight * (v - (a * noise - s * x0)).square().flatten(1).mean(1)).mean()
