"""A learned token and the pooled embedding of published encoders, whose config says ``eos_token_id: 2``."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wadi.backbones import from_pipeline, load_pipeline
from wadi.extras.relation.token_file import add_token

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import small_pipelines


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Save a small SDXL whose two encoders give the end token as the published ones do."""
    folder = tmp_path_factory.mktemp("published")
    pipeline = small_pipelines.make("sdxl", folder / "parts")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.config.eos_token_id = 2
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("token") / "R.safetensors"
    save_file({"clip_l": torch.randn(1, 16), "clip_g": torch.randn(1, 16)}, file, {"format": "pt", "token": "<R>"})
    return file


def pooled(pipeline, prompts):
    return from_pipeline(pipeline).encode(prompts).tensors["pooled"]


def expected_pooled(pipeline, prompts):
    """Return the second encoder's state at the first end token, projected."""
    ids = pipeline.tokenizer_2(prompts, padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder_2.text_model(ids).last_hidden_state
    ends = (ids == pipeline.tokenizer_2.eos_token_id).int().argmax(-1)
    return pipeline.text_encoder_2.text_projection(states[torch.arange(len(ids)), ends])


@torch.no_grad()
def test_words_after_a_learned_token_change_the_pooled_embedding(published, token):
    pipeline = load_pipeline(published)
    assert pipeline.text_encoder_2.config.eos_token_id == 2  # an ordinary vocabulary needs no correction
    plain = pooled(pipeline, ["a red", "blue"])
    add_token(pipeline, token)
    red, blue = pooled(pipeline, ["a <R> red", "a <R> blu"])
    assert float((red - blue).abs().max()) > 1e-3
    torch.testing.assert_close(torch.stack([red, blue]), expected_pooled(pipeline, ["a <R> red", "a <R> blu"]))
    assert torch.equal(pooled(pipeline, ["a red", "blue"]), plain)
    ids = pipeline.tokenizer(["a <R> b", "a <R> c"], padding="max_length", return_tensors="pt").input_ids
    first = pipeline.text_encoder(ids)
    assert not torch.equal(*first.pooler_output)  # also in CLIPTextModel, which has no projection


@torch.no_grad()
def test_a_saved_pipeline_keeps_the_correction_and_one_saved_without_it_is_corrected(published, token, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    ours = load_pipeline(published)
    add_token(ours, token)
    expected = pooled(ours, ["a <R> red"])
    ours.save_pretrained(tmp_path / "saved")
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    assert plain.text_encoder_2.config.eos_token_id == plain.tokenizer_2.eos_token_id
    assert torch.equal(plain.encode_prompt("a <R> red", do_classifier_free_guidance=False)[2], expected)
    plain.text_encoder_2.config.eos_token_id = 2  # as diffusers' own load_textual_inversion leaves it
    plain.save_pretrained(tmp_path / "theirs")
    assert torch.equal(pooled(load_pipeline(tmp_path / "theirs"), ["a <R> red"]), expected)
