"""Stage 3 of the recipe: the U-Net and its text encoder, trained together in the autoencoder's latents.

v-prediction on Stable Diffusion's ``scaled_linear`` schedule: ``x_t = alpha_t x_0 + sigma_t eps``,
``v = alpha_t eps - sigma_t x_0``, hence ``x_0 = alpha_t x_t - sigma_t v``, well conditioned also at t = 999. The
loss on v is weighted by ``min(1, (1 + GAMMA) / (1 + snr_t))``: whole where the picture is decided, fading where only
the last grain of noise is left. The pooled text is added to the time embedding (``addition_embed_type="text"``),
without which prompts are obeyed badly at this size.
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
    from wadi.zoo.recipe.stages import ZooConfig

SIDE = 16
GAMMA = 5.0
SMALLEST = 0.66  # side of the smallest sprite, of the picture's
FOCUS = 0.5  # how much more often timesteps in the middle are drawn than those at either end: (1 + FOCUS) / (1 - FOCUS)
DROP = 0.1  # captions replaced by the empty prompt
GUIDANCE, STEPS = 2.5, 25


def build_unet(channels: tuple[int, ...] = (80, 128, 192)) -> Any:
    """An untrained ``UNet2DConditionModel`` on ``(12, 16, 16)`` latents."""
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
    """DDIM as the pipeline is shipped with: 1,000 steps, v-prediction, trailing spacing (a run starts at t = 999)."""
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
    """The ``StableDiffusionPipeline`` of these parts, without safety checker (nothing drawn here needs one)."""
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
    """Pictures ``(N, 3, 64, 64)`` in [0, 1] of ``STEPS`` steps at ``GUIDANCE``, one generator for each picture."""
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
    """A ring of latents ``(capacity, 12, 16, 16)`` fp16 with what they show; always being renewed."""

    latents: Tensor
    labels: Tensor  # (capacity, 3): concept, style, colour
    filled: int = 0
    next: int = 0

    def add(self, latents: Tensor, labels: Tensor) -> None:
        where = (self.next + torch.arange(len(latents))) % len(self.latents)
        self.latents[where], self.labels[where] = latents.half(), labels
        self.next = int(where[-1] + 1) % len(self.latents)
        self.filled = min(self.filled + len(latents), len(self.latents))


@torch.no_grad()
def fresh(ae: Any, sprites: Tensor, concept: Tensor, style: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents and labels of new compositions; ``sprites (concepts, styles, 4, S, S)``."""
    pose = random_pose(len(concept), generator, SMALLEST, mirror=False)
    return encode(ae, compose(sprites[concept, style], pose)), torch.stack([concept, style, pose.colour], 1)


def draw_captions(labels: Tensor, generator: torch.Generator) -> list[str]:
    """A caption for each row of labels; style and colour named half of the time, all of it dropped ``DROP`` of it."""
    u = torch.rand(len(labels), 3, generator=generator).tolist()
    names, styles, colours = list(CONCEPTS), list(STYLES), list(COLOURS)
    return [
        "" if drop < DROP else caption(names[c], styles[s] if a < 0.5 else None, colours[k] if b < 0.5 else None)
        for (c, s, k), (a, b, drop) in zip(labels.tolist(), u, strict=True)
    ]


@contextmanager
def fast() -> Iterator[None]:
    """bfloat16 products, 1.8 times as fast where the processor has them, and attention written out.

    The fused attention's backward pass in bfloat16 took a quarter of a training step here, for 64 tokens at most.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """``count`` timesteps below ``total``, ascending and spread over all of them, denser in the middle.

    ``t = total (u + FOCUS sin(2 pi u) / 2 pi)``, whose density is ``1 / (1 + FOCUS cos(2 pi u))``: near either end a
    picture is either settled or cannot be guessed, and the loss there is mostly noise.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    warped = u + FOCUS * torch.sin(2 * torch.pi * u) / (2 * torch.pi)
    return (total * warped).long().clamp(0, total - 1)


def v_loss(unet: Any, states: Tensor, x0: Tensor, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Weighted error of the predicted velocity of ``x0 (B, 12, 16, 16)`` at random timesteps."""
    t = timesteps(len(x0), len(alphas_cumprod), generator)
    noise = torch.randn(x0.shape, generator=generator)
    alpha, sigma = alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    x_t = (a * x0 + s * noise).contiguous(memory_format=torch.channels_last)
    with fast():
        v = unet(x_t, t, encoder_hidden_states=states).sample.float()
    weight = ((1 + GAMMA) * sigma.square()).clamp(max=1.0)  # 1 / (1 + snr) is sigma^2
    return (weight * (v - (a * noise - s * x0)).square().flatten(1).mean(1)).mean()


def load_trained(ae: Any, out: Path) -> tuple[Any, dict[str, Any]]:
    """The pipeline of the averaged weights in ``out``'s checkpoint, and the checkpoint's note."""
    tensors, note = load_tensors(out / "teacher.safetensors")
    tokenizer = load_tokenizer(out / "tokenizer")
    unet, text_encoder = build_unet().eval(), build_text_encoder(tokenizer).eval()
    for name, module in (("unet", unet), ("text_encoder", text_encoder)):
        prefix = f"average.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return assemble(ae, text_encoder, tokenizer, unet), note


def train_teacher(config: ZooConfig, ae: Any, sprites: Sprites, out: Path) -> None:
    """Train within ``config.minutes_teacher``, resuming from ``out`` and leaving ``teacher.safetensors`` there."""
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
    art = sprites.pixels[sprites.of_concepts()]
    pool = fill_pool(config, ae, art, generator)
    budget = Budget(config.minutes_teacher, note["elapsed"])
    with log(out / "teacher.jsonl", "teacher", budget) as lines:
        while budget.fraction < 1:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * budget.rate()
            new = torch.randint(len(CONCEPTS) * len(STYLES), (config.fresh_per_step,), generator=generator)
            pool.add(*fresh(ae, art, new // len(STYLES), new % len(STYLES), generator))
            index = torch.randint(pool.filled, (config.batch_teacher,), generator=generator)
            texts = draw_captions(pool.labels[index], generator)
            with fast():
                states = model["text_encoder"](torch.stack([ids[text] for text in texts]))[0].float()
            loss = v_loss(model["unet"], states, pool.latents[index].float(), alphas_cumprod, generator)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
            step += 1
            lines.step(loss.item(), len(index))
            if budget.elapsed - last_grid > 60 * config.minutes_grid or budget.fraction >= 1:
                last_grid = budget.elapsed
                save_run(path, model, optimiser, average, elapsed=budget.elapsed, step=step)
                show(load_trained(ae, out)[0], out / f"teacher-{budget.elapsed / 60:03.0f}min.png")
                lines.write(step=step)


def fill_pool(config: ZooConfig, ae: Any, art: Tensor, generator: torch.Generator) -> Pool:
    """A pool that starts with ``config.first_fill`` compositions of every sprite."""
    pool = Pool(torch.empty(config.pool, CHANNELS, SIDE, SIDE, dtype=torch.half), torch.zeros(config.pool, 3).long())
    every = torch.cartesian_prod(torch.arange(len(CONCEPTS)), torch.arange(len(STYLES))).repeat(config.first_fill, 1)
    for part in every.split(96):
        pool.add(*fresh(ae, art, part[:, 0], part[:, 1], generator))
    return pool


def show(pipe: Any, path: Path) -> None:
    """The grid of fixed prompts, four seeds each, three prompts to a row."""
    from wadi.zoo.recipe.report import save_grid

    prompts = fixed_prompts()
    pictures = sample(pipe, [p for p in prompts for _ in range(4)], list(range(4)) * len(prompts), batch=24)
    save_grid(path, pictures, columns=12)
