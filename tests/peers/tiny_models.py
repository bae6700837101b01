"""Tiny seeded stand-ins for the checkpoints PEFT's tests fetch from the Hub."""

import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import tiny

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


def tiny_pipeline():
    """The suite's own tiny Stable Diffusion pipeline, random weights."""
    with tempfile.TemporaryDirectory() as folder:
        return tiny.stable_diffusion(Path(folder))
