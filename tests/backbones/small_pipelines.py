"""Every supported pipeline class, made small: real diffusers and transformers classes with random weights, nothing downloaded.

Images are 16 x 16 (Sana's autoencoder shrinks 32-fold, so 64 x 64 there), text encoders two layers of width 16 or 32.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

import tiny

TOKENS = 16  # of CLIP
SIDE = 16


def clip_text(words, width, projection=None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=1,
        **({"projection_dim": projection} if projection else {}),
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width=32):
    """``(tokenizer, encoder)`` over single letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -3.0) for letter in string.printable if not letter.isspace()]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    return T5Tokenizer(vocab=vocabulary, extra_ids=0), T5EncoderModel(config)


def gemma(width=32):
    """``(tokenizer, model)`` over single letters; what is unknown between two known ones is one token."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {word: i for i, word in enumerate([*special, "▁", *"redblugnapc"])}
    config = Gemma2Config(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, sliding_window=4096,
    )  # fmt: skip
    return GemmaTokenizer(vocab=vocabulary), Gemma2Model(config)


def autoencoder(**config):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=SIDE, **config,
    )  # fmt: skip


def autoencoder_dc():
    from diffusers import AutoencoderDC

    stages = 6
    return AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * stages, decoder_block_out_channels=(8,) * stages,
        encoder_qkv_multiscales=((),) * stages, decoder_qkv_multiscales=((),) * stages,
        encoder_layers_per_block=(1,) * stages, decoder_layers_per_block=(1,) * stages, downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
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


def qwen3(width=32):
    """``(tokenizer, model)`` over single letters, with a chat template."""
    from transformers import GemmaTokenizer, Qwen3Config, Qwen3Model

    words, _ = gemma(width)
    words = GemmaTokenizer(vocab=words.get_vocab(), padding_side="right")
    words.chat_template = (
        "{% for message in messages %}red {{ message['content'] }} blu {% endfor %}{% if add_generation_prompt %}gap{% endif %}"
    )
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return words, Qwen3Model(config)


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


def readied(pipeline):
    """In evaluation mode, quiet, and with every zero-initialised parameter made random: zeros hide mistakes."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            with torch.no_grad():
                for parameter in component.parameters():
                    if not parameter.any():
                        parameter.normal_(std=0.05)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
