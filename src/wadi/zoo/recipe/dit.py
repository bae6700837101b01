"""The DiT teacher: `zoo-dit`. Its images show one thing, or two.

Noise prediction on PixArt's linear schedule, as the DiT of the paper has it. There ``x_0 = (x_t - sigma_t eps) / alpha_t``
multiplies the network's error by 157 at the last timestep, and by 15 at t = 727: the difficulty of real PixArt models.

The loss on eps is weighted by ``min(1 / alpha_t^2, LARGEST_WEIGHT) min(1, (1 + GAMMA) / (1 + snr_t))``. The first factor makes
it a loss on v up to a point. Without it a network of this size hardly learns what the noisy timesteps decide: which things
there are, and where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wadi.zoo.concepts import CONCEPTS, STYLES
from wadi.zoo.prompts import fixed_pair_prompts, fixed_prompts
from wadi.zoo.recipe import scenes, t5_text
from wadi.zoo.recipe.autoencoder import CHANNELS, encode
from wadi.zoo.recipe.kinds import DROP, GAMMA, SIDE, Kind, fast_products, placed_like

LARGEST_WEIGHT = 20.0
POWER = 1.5  # timesteps are T u^POWER with uniform u: earlier ones are more frequent


class DiTTeacher(Kind):
    """``PixArtAlphaPipeline`` with a ``PixArtTransformer2DModel`` and a ``T5EncoderModel``."""

    name, network, file = "dit", "transformer", "dit"
    text: ClassVar[Any] = t5_text
    label_size = 4  # first concept, second or -1, style, colour
    minutes = 240.0
    to_adam = ("shared", "embed_tokens", "relative_attention_bias", "scale_shift_table", "pos_embed", "transformer.proj_out")
    shows_pairs = True
    guidance_scale, steps = 3.0, 20

    def build_network(self) -> Any:
        """See `Kind.build_network`."""
        return build_transformer()

    def build_scheduler(self) -> Any:
        """See `Kind.build_scheduler`."""
        return build_scheduler()

    def assemble(self, ae: Any, model: nn.ModuleDict, tokenizer: Any) -> Any:
        """See `Kind.assemble`."""
        from diffusers import PixArtAlphaPipeline

        pipe: Any = PixArtAlphaPipeline(
            vae=ae,
            text_encoder=model["text_encoder"],
            tokenizer=tokenizer,
            transformer=model["transformer"],
            scheduler=build_scheduler(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def labels(self, count: int | None, generator: torch.Generator) -> Tensor:
        """See `Kind.labels`."""
        return scenes.random_labels(len(CONCEPTS) * len(STYLES) if count is None else count, generator)

    @torch.no_grad()
    def latents(self, ae: Any, sprites: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `Kind.latents`."""
        return encode(ae, scenes.random_scenes(sprites, labels, generator)), labels

    def captions(self, labels: Tensor, generator: torch.Generator) -> list[str]:
        """See `Kind.captions`."""
        return scenes.captions(labels, generator, DROP)

    def loss(
        self, model: nn.ModuleDict, tokenizer: Any, texts: Sequence[str], x0: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See `Kind.loss`."""
        ids, mask = placed_like(t5_text.tokenize(tokenizer, texts), x0)
        with fast_products(x0.device):
            states = model["text_encoder"](ids, attention_mask=mask)[0]
        return eps_loss(model["transformer"], states, mask, x0, self.alphas_cumprod, generator)

    def fixed_prompts(self) -> list[str]:
        """See `Kind.fixed_prompts`."""
        return fixed_prompts()[:6] + fixed_pair_prompts()[:6]


def build_transformer(layers: int = 6, heads: int = 8, width: int = 32) -> Any:
    """Return an untrained ``PixArtTransformer2DModel`` on ``(12, 16, 16)`` latents: 64 tokens of ``heads * width`` channels."""
    from diffusers import PixArtTransformer2DModel

    transformer: Any = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=layers,
        cross_attention_dim=heads * width,
        sample_size=SIDE,
        patch_size=2,
        caption_channels=t5_text.HIDDEN,
        use_additional_conditions=False,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def build_scheduler() -> Any:
    """Return the shipped scheduler: PixArt's linear schedule of 1,000 steps, noise prediction, DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon"
    )


def timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` timesteps below ``total``, spread over all of them, earlier ones more often.

    The linear schedule spends half of its timesteps where less than 8 % of the signal's power is left.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (total * u**POWER).long().clamp(0, total - 1)


def eps_loss(
    transformer: Any, states: Tensor, mask: Tensor, x0: Tensor, alphas_cumprod: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the weighted error of the predicted noise of ``x0 (B, 12, 16, 16)`` at random timesteps.

    Args:
        states: of the prompts, ``(B, L, HIDDEN)``.
        mask: of their tokens, ``(B, L)``.
    """
    t = timesteps(len(x0), len(alphas_cumprod), generator)
    t, power, noise = placed_like((t, alphas_cumprod[t], torch.randn(x0.shape, generator=generator)), x0)
    a, s = power.sqrt()[:, None, None, None], (1 - power).sqrt()[:, None, None, None]
    with fast_products(x0.device):
        eps = transformer(
            a * x0 + s * noise,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.float()
    weight = (1 / power).clamp(max=LARGEST_WEIGHT) * ((1 + GAMMA) * (1 - power)).clamp(max=1.0)  # 1 / (1 + snr) is sigma^2
    return (weight * (eps - noise).square().flatten(1).mean(1)).mean()
