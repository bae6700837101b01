"""Every supported pipeline class, made small: real diffusers and transformers classes with random weights, nothing downloaded.

Images are 16 x 16 (Sana's autoencoder shrinks 32-fold, so 64 x 64 there), text encoders two layers of width 16 or 32.
"""

from __future__ import annotations

from pathlib import Path

import torch

import tiny
from wadi.testing.components import (
    SIDE,
    autoencoder,
    autoencoder_dc,
    byte_tokenizer,
    clip_text,
    gemma,
    qwen3,
    qwen_vl,
    readied,
    t5,
)  # fmt: skip


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


def lumina2(folder: Path):
    """Its pipeline always takes 8 pixels for a latent."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    words, text = gemma()
    network = Lumina2Transformer2DModel(
        sample_size=2 * SIDE // 8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32),
        cap_feat_dim=32,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), text_encoder=text, tokenizer=words,
        vae=autoencoder(levels=4, shift_factor=0.11, scaling_factor=0.36),
    )  # fmt: skip


def chroma(folder: Path):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    words, text = t5()
    network = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=autoencoder(shift_factor=0.11),
        text_encoder=text, tokenizer=words, transformer=network,
    )  # fmt: skip


def qwen_image(folder: Path):
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    words, text = qwen_vl()
    network = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.2, 0.1, 0.3, 0.0], latents_std=[0.9, 1.2, 0.8, 1.5],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.4, max_shift=0.9, max_image_seq_len=8192
    )
    return QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=words, transformer=network)


def _flux2(cls, network, **parts):
    """The moments of its autoencoder are those of a batch norm."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=SIDE,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
        timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4), **network,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return cls(scheduler=scheduler, vae=vae, transformer=transformer, **parts)


def flux2_klein(folder: Path):
    """Its text encoder has as many layers as the pipeline reads hidden states from."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = byte_tokenizer("<|im_start|>", "<|im_end|>")
    words.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=27, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    parts = {"tokenizer": words, "text_encoder": Qwen3ForCausalLM(config)}
    return _flux2(Flux2KleinPipeline, {"guidance_embeds": False}, **parts)


def flux2(folder: Path):
    """With a tokenizer in the place of Pixtral's processor, which needs torchvision; the pipeline calls both alike."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    words = byte_tokenizer("[IMG]", "[INST]", "[/INST]")
    words.chat_template = (
        "{% for m in messages %}[INST]{% for part in m.content %}{{ part.text }}{% endfor %}[/INST]{% endfor %}"
    )
    config = Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
        },
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip
    parts = {"tokenizer": words, "text_encoder": Mistral3ForConditionalGeneration(config)}
    return _flux2(Flux2Pipeline, {"guidance_embeds": True}, **parts)


MAKERS = {
    "sd1": sd1, "sd2": sd2, "sdxl": sdxl, "pixart-alpha": pixart_alpha, "pixart-sigma": pixart_sigma, "sd3": sd3, "flux": flux,
    "sana": sana, "z-image": z_image, "lumina2": lumina2, "chroma": chroma, "qwen-image": qwen_image,
    "flux2-klein": flux2_klein, "flux2": flux2,
}  # fmt: skip
# Where the pipeline's own size is not the one to test at.
AT_16 = ("pixart-alpha", "flux", "z-image", "chroma", "qwen-image", "flux2-klein", "flux2")
RESOLUTIONS = dict.fromkeys(AT_16, (SIDE, SIDE))


def make(name: str, folder: Path):
    """A pipeline by its name in `MAKERS`, seeded."""
    torch.manual_seed(0)
    return readied(MAKERS[name](folder))
