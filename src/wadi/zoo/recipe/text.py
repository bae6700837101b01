"""The teacher's tokenizer and text encoder: CLIP's classes, with a vocabulary learned from the captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wadi.io.records import parse_json
from wadi.zoo.prompts import training_prompts

LENGTH = 24
HIDDEN = 192
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path) -> None:
    """Learn merges from the captions, and write ``vocab.json`` and ``merges.txt`` as CLIP's tokenizer reads them.

    All 256 bytes are in the vocabulary, inside a word and at its end, so any text can be spelt.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(",", "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    words = sorted({word for prompt in training_prompts() for word in prompt.replace(",", " ,").split()})
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in parse_json(tokenizer.to_str(), Any, "The tokenizer")["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def load_tokenizer(folder: Path) -> Any:
    """Load the ``CLIPTokenizer`` of a folder that ``write_tokenizer`` filled."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def tokenize(tokenizer: Any, prompts: list[str]) -> Any:
    """Return token ids ``(B, LENGTH)``, padded as ``StableDiffusionPipeline`` pads them."""
    return tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def build_text_encoder(tokenizer: Any) -> Any:
    """Return an untrained ``CLIPTextModel`` with states ``(B, LENGTH, HIDDEN)``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            projection_dim=HIDDEN,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
