"""Small pipelines of the real classes with random weights: what the laws are tested on."""

from __future__ import annotations

from pathlib import Path

import torch

from wadi.testing.components import clip_tokenizer as tokenizer


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", seed: int = 0, **unet):
    """A ``StableDiffusionPipeline`` of some thousand parameters, 8x8x4 latents, 16x16 images."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    words = tokenizer(folder / "words")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=1,
        )
    )  # fmt: skip
    network = UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8, **unet,
        }
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=network, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(teacher: Path, prompts: Path, out: Path, **changes):
    """A distillation of some seconds: two images a step, a grid of one prompt. ``student={...}`` and so on merge."""
    from wadi.distill.config_files import from_dict

    values = {
        "teacher": str(teacher), "prompts": str(prompts), "out": str(out), "steps": 3, "batch": 2, "seed": 5, "device": "cpu",
        "student": {"rank": 4, "lr": 1e-3}, "fake": {"rank": 2, "lr": 1e-2}, "sample_every": 0, "checkpoint_every": 0,
        "sample_prompts": ["red apple"], "sample_seeds": 2, "teacher_steps": 2,
    }  # fmt: skip
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return from_dict(values)
