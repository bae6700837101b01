"""Small parts of pipelines: real classes of diffusers and transformers with random weights. Nothing is downloaded.

Images are 16 x 16. Text encoders have two layers of width 16 or 32, and tokenizers of single letters.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

TOKENS = 16  # of CLIP
SIDE = 16  # pixels


def clip_tokenizer(folder: Path):
    """A CLIP tokenizer over single bytes: every text has tokens, nothing is downloaded."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


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


def autoencoder(levels=2, **config):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=4, sample_size=SIDE, **config,
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


def byte_tokenizer(*special):
    """Qwen's tokenizer over single bytes, with ``special`` tokens."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {symbol: i for i, symbol in enumerate(["<|endoftext|>", *bytes_to_unicode().values()])}
    words = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    words.add_special_tokens({"additional_special_tokens": list(special)})
    return words


def qwen_vl(width=32):
    """``(tokenizer, model)`` of Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = byte_tokenizer("<|im_start|>", "<|im_end|>")
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    extra: dict[str, Any] = {name: len(words) + i for i, name in enumerate(ids)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words) + len(ids), "hidden_size": width, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        **extra,
    )  # fmt: skip
    return words, Qwen2_5_VLForConditionalGeneration(config)


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
