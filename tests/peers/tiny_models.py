"""Tiny seeded stand-ins for the checkpoints PEFT's tests fetch from the Hub."""

import json
import os
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    OPTConfig,
)

OPT, LLAMA, SD = "tiny-opt", "tiny-llama", "tiny-sd"


def _decoder_config(model_id):
    if model_id == OPT:
        return OPTConfig(
            vocab_size=99, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0, pad_token_id=1,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip


class TinyDecoder:
    """``from_pretrained`` of a seeded random model by its name here, or of a folder as usual."""

    @staticmethod
    def from_pretrained(model_id, **kwargs):
        if os.path.isdir(model_id):
            return AutoModelForCausalLM.from_pretrained(model_id, **kwargs)
        config = _decoder_config(model_id)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
        model.config._name_or_path = model.name_or_path = model_id
        return model.eval() if dtype is None else model.to(dtype).eval()


def _tokenizer():
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({word: k for k, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=16), len(words)


def tiny_pipeline():
    """A Stable Diffusion pipeline of a few thousand parameters."""
    tokenizer, words = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
            attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        )  # fmt: skip
        text = CLIPTextConfig(
            vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        text_encoder = CLIPTextModel(text)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
