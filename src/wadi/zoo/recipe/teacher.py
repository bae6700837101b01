"""Stage 3 of the recipe: the U-Net and its text encoder, trained together in the autoencoder's latents.

v-prediction on Stable Diffusion's ``scaled_linear`` schedule, which is well conditioned also at t = 999:

    x_t = alpha_t x_0 + sigma_t eps        v = alpha_t eps - sigma_t x_0        x_0 = alpha_t x_t - sigma_t v

The loss on v is weighted by ``min(1, (1 + GAMMA) / (1 + snr_t))``: full weight where the image is decided, less where only the
last noise remains. The pooled text is added to the time embedding (``addition_embed_type="text"``); without it a network of
this size follows prompts badly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wadi.backbones import from_pipeline
from wadi.zoo.concepts import COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import caption, fixed_prompts, training_prompts
from wadi.zoo.recipe.autoencoder import CHANNELS, encode
from wadi.zoo.recipe.compose import compose, random_pose
from wadi.zoo.recipe.icons import Sprites
from wadi.zoo.recipe.optim import Muon, groups_of
from wadi.zoo.recipe.state import Average, Budget, load_tensors, resume_run, save_run
from wadi.zoo.recipe.text import HIDDEN, build_text_encoder, load_tokenizer, tokenize, write_tokenizer

if TYPE_CHECKING:
    from wadi.zoo.recipe.config import ZooConfig

SIDE = 16
GAMMA = 5.0
SMALLEST = 0.66  # side of the smallest sprite, as a share of the image's
FOCUS = 0.5  # timesteps in the middle are (1 + FOCUS) / (1 - FOCUS) times as frequent as those at either end
DROP = 0.1  # captions replaced by the empty prompt
GUIDANCE, STEPS = 2.5, 25


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
        cross_attention_dim=HIDDEN,
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
def sample(pipe: Any, prompts: list[str], seeds: list[int], batch: int = 32) -> Tensor:
    """Return images ``(N, 3, 64, 64)`` in [0, 1] of ``STEPS`` steps at ``GUIDANCE``, with one generator for each image."""
    parts, call = [], from_pipeline(pipe).guided_call(GUIDANCE)
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        run = pipe(
            prompts[i : i + batch],
            num_inference_steps=STEPS,
            generator=generators,
            output_type="pt",
            **call,
        )
        parts.append(run.images)
    return torch.cat(parts)


@dataclass
class Pool:
    """A ring of latents ``(capacity, 12, 16, 16)`` fp16 with the labels of their contents. New latents replace the oldest."""

    latents: Tensor
    labels: Tensor  # (capacity, 3): concept, style, colour
    filled: int = 0
    next: int = 0

    def add(self, latents: Tensor, labels: Tensor) -> None:
        """Add latents and their labels ``(n, 3)``."""
        where = (self.next + torch.arange(len(latents))) % len(self.latents)
        self.latents[where], self.labels[where] = latents.half(), labels
        self.next = int(where[-1] + 1) % len(self.latents)
        self.filled = min(self.filled + len(latents), len(self.latents))


@torch.no_grad()
def new_latents(ae: Any, sprites: Tensor, concept: Tensor, style: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return latents and labels of new compositions, from ``sprites (concepts, styles, 4, S, S)``."""
    pose = random_pose(len(concept), generator, SMALLEST, mirror=False)
    return encode(ae, compose(sprites[concept, style], pose)), torch.stack([concept, style, pose.colour], 1)


def draw_captions(labels: Tensor, generator: torch.Generator) -> list[str]:
    """Return a caption for each row of labels.

    Style and colour are each named half of the time. A share ``DROP`` of the captions is empty.
    """
    u = torch.rand(len(labels), 3, generator=generator).tolist()
    names, styles, colours = list(CONCEPTS), list(STYLES), list(COLOURS)
    return [
        "" if drop < DROP else caption(names[c], styles[s] if a < 0.5 else None, colours[k] if b < 0.5 else None)
        for (c, s, k), (a, b, drop) in zip(labels.tolist(), u, strict=True)
    ]


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Use bfloat16 products, 1.8 times as fast where the processor has them, and attention without the fused kernel.

    The backward pass of fused attention in bfloat16 took a quarter of a training step here, for at most 64 tokens.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


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
    noise = torch.randn(x0.shape, generator=generator)
    alpha, sigma = alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    x_t = (a * x0 + s * noise).contiguous(memory_format=torch.channels_last)
    with bfloat16_products():
        v = unet(x_t, t, encoder_hidden_states=states).sample.float()
    weight = ((1 + GAMMA) * sigma.square()).clamp(max=1.0)  # 1 / (1 + snr) is sigma^2
    return (weight * (v - (a * noise - s * x0)).square().flatten(1).mean(1)).mean()


def load_trained(ae: Any, out: Path) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of the averaged weights in ``out``'s checkpoint, and the checkpoint's note."""
    tensors, note = load_tensors(out / "teacher.safetensors")
    tokenizer = load_tokenizer(out / "tokenizer")
    unet, text_encoder = build_unet().eval(), build_text_encoder(tokenizer).eval()
    for name, module in (("unet", unet), ("text_encoder", text_encoder)):
        prefix = f"average.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return assemble(ae, text_encoder, tokenizer, unet), note


def train_teacher(config: ZooConfig, ae: Any, sprites: Sprites, out: Path) -> None:
    """Train for ``config.minutes_teacher``, resuming from ``out``. Write ``teacher.safetensors`` there."""
    from wadi.zoo.recipe.report import log

    torch.manual_seed(config.seed)
    if not (out / "tokenizer" / "vocab.json").is_file():
        write_tokenizer(out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    model = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    optimiser = Muon(groups_of(model, config.lr_teacher, 2e-3), lr=config.lr_teacher, dtype=torch.bfloat16)
    average, path = Average(model, 0.9985), out / "teacher.safetensors"
    note = resume_run(path, model, optimiser, average) or {"elapsed": 0.0, "step": 0}
    if note["elapsed"] >= 60 * config.minutes_teacher:
        return
    step, last_grid = note["step"], note["elapsed"]
    generator = torch.Generator().manual_seed(config.seed + step)
    alphas_cumprod = build_scheduler().alphas_cumprod
    ids = {text: tokenize(tokenizer, [text])[0] for text in ("", *training_prompts())}
    concept_sprites = sprites.pixels[sprites.of_concepts()]
    pool = fill_pool(config, ae, concept_sprites, generator)
    budget = Budget(config.minutes_teacher, note["elapsed"])
    with log(out / "teacher.jsonl", "teacher", budget) as log_lines:
        while budget.fraction < 1:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * budget.rate()
            sprite_index = torch.randint(len(CONCEPTS) * len(STYLES), (config.fresh_per_step,), generator=generator)
            pool.add(*new_latents(ae, concept_sprites, sprite_index // len(STYLES), sprite_index % len(STYLES), generator))
            index = torch.randint(pool.filled, (config.batch_teacher,), generator=generator)
            texts = draw_captions(pool.labels[index], generator)
            with bfloat16_products():
                states = model["text_encoder"](torch.stack([ids[text] for text in texts]))[0].float()
            loss = v_loss(model["unet"], states, pool.latents[index].float(), alphas_cumprod, generator)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
            step += 1
            log_lines.step(loss.item(), len(index))
            if budget.elapsed - last_grid > 60 * config.minutes_grid or budget.fraction >= 1:
                last_grid = budget.elapsed
                save_run(path, model, optimiser, average, elapsed=budget.elapsed, step=step)
                save_samples(load_trained(ae, out)[0], out / f"teacher-{budget.elapsed / 60:03.0f}min.png")
                log_lines.write(step=step)


def fill_pool(config: ZooConfig, ae: Any, concept_sprites: Tensor, generator: torch.Generator) -> Pool:
    """Return a pool that starts with ``config.first_fill`` compositions of every sprite."""
    pool = Pool(torch.empty(config.pool, CHANNELS, SIDE, SIDE, dtype=torch.half), torch.zeros(config.pool, 3).long())
    all_sprites = torch.cartesian_prod(torch.arange(len(CONCEPTS)), torch.arange(len(STYLES))).repeat(config.first_fill, 1)
    for part in all_sprites.split(96):
        pool.add(*new_latents(ae, concept_sprites, part[:, 0], part[:, 1], generator))
    return pool


def save_samples(pipe: Any, path: Path) -> None:
    """Write the grid of fixed prompts: four seeds of each, three prompts in a row."""
    from wadi.zoo.recipe.report import save_grid

    prompts = fixed_prompts()
    images = sample(pipe, [p for p in prompts for _ in range(4)], list(range(4)) * len(prompts), batch=24)
    save_grid(path, images, columns=12)
