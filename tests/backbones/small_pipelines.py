"""Every supported pipeline class, made small: real diffusers and transformers classes with random weights, nothing downloaded.

Images are 16 x 16 (Sana's autoencoder shrinks 32-fold, so 64 x 64 there), text encoders two layers of width 16 or 32.
"""

from __future__ import annotations

from pathlib import Path

import torch

import tiny
from wadi.testing.components import SIDE, autoencoder, autoencoder_dc, clip_text, gemma, qwen3, readied, t5


def sd1(folder: Path):
    return tiny.stable_diffusion(folder)


def sd2(folder: Path):
    return tiny.stable_diffusion(folder, "v_prediction", use_linear_projection=True)


def sdxl(folder: Path):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    words = tiny.tokenizer(folder / "words")
    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.7, latents_mean=[-0.2, 0.1, 0.3, 0.0], latents_std=[0.9, 1.2, 0.8, 1.5]),
        text_encoder=clip_text(words, 16), text_encoder_2=clip_text(words, 16, 16), tokenizer=words,
        tokenizer_2=words, unet=network, force_zeros_for_empty_prompt=True, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
    )  # fmt: skip


def _pixart(cls, **network):
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    words, text = t5()
    transformer = PixArtTransformer2DModel(
        **{
            "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
            "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8, **network,
        }
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return cls(tokenizer=words, text_encoder=text, vae=autoencoder(), transformer=transformer, scheduler=scheduler)


def pixart_alpha(folder: Path):
    """Of a size of 128 latents, at which the network is told resolution and aspect ratio."""
    from diffusers import PixArtAlphaPipeline

    return _pixart(PixArtAlphaPipeline, sample_size=128)


def pixart_sigma(folder: Path):
    from diffusers import PixArtSigmaPipeline

    return _pixart(PixArtSigmaPipeline)


def sd3(folder: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    words = tiny.tokenizer(folder / "words")
    words_3, text_3 = t5()
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift_factor=0.06),
        text_encoder=clip_text(words, 16, 16), tokenizer=words, text_encoder_2=clip_text(words, 16, 16), tokenizer_2=words,
        text_encoder_3=text_3, tokenizer_3=words_3,
    )  # fmt: skip


def flux(folder: Path, guidance_embeds=True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words = tiny.tokenizer(folder / "words")
    words_2, text_2 = t5()
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=autoencoder(shift_factor=0.11),
        text_encoder=clip_text(words, 16), tokenizer=words, text_encoder_2=text_2, tokenizer_2=words_2, transformer=network,
    )  # fmt: skip


def sana(folder: Path):
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    words, text = gemma()
    network = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32, sample_size=2,
        timestep_scale=0.7,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return SanaPipeline(tokenizer=words, text_encoder=text, vae=autoencoder_dc(), transformer=network, scheduler=scheduler)


def z_image(folder: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    words, text = qwen3()
    network = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift_factor=0.11, scaling_factor=0.36),
        text_encoder=text, tokenizer=words, transformer=network,
    )  # fmt: skip


MAKERS = {
    "sd1": sd1, "sd2": sd2, "sdxl": sdxl, "pixart-alpha": pixart_alpha, "pixart-sigma": pixart_sigma, "sd3": sd3, "flux": flux,
    "sana": sana, "z-image": z_image,
}  # fmt: skip
# Where the pipeline's own size is not the one to test at.
RESOLUTIONS = {"pixart-alpha": (SIDE, SIDE), "flux": (SIDE, SIDE), "z-image": (SIDE, SIDE)}


def make(name: str, folder: Path):
    """A pipeline by its name in `MAKERS`, seeded."""
    torch.manual_seed(0)
    return readied(MAKERS[name](folder))
