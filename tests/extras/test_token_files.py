"""Textual inversions as other tools write them (A1111, two encoders, no name), and files that are not one."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raising import raises_naming
from wadi.backbones import load_pipeline
from wadi.extras.relation.token_file import CONVERT, add_token
from wadi.extras.relation.vocabulary import text_encoders

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
import small_pipelines


@pytest.fixture
def pipeline(sd_folder):
    return load_pipeline(sd_folder)


def row_of(pipeline, token, number=0):
    encoder = text_encoders(pipeline)[number]
    return encoder.table[encoder.id_of(token)]


@pytest.mark.parametrize("key", ["emb_params", "*"])
def test_a_token_without_a_name_is_given_one(key, pipeline, tmp_path):
    rows = torch.randn(2, 32)
    save_file({key: rows}, tmp_path / "my-cat.safetensors")
    with raises_naming("my-cat.safetensors"):
        add_token(pipeline, tmp_path / "my-cat.safetensors")
    assert add_token(pipeline, tmp_path / "my-cat.safetensors", "<cat>") == "<cat>"
    torch.testing.assert_close(row_of(pipeline, "<cat>"), rows[0])
    torch.testing.assert_close(row_of(pipeline, "<cat>_1"), rows[1])


def test_a_file_for_two_encoders_without_a_name(tmp_path):
    rows = {"clip_g": torch.randn(2, 16), "clip_l": torch.randn(2, 16)}
    save_file(rows, tmp_path / "style.safetensors")
    pipeline = small_pipelines.make("sdxl", tmp_path / "parts")
    pipeline.tokenizer_2 = type(pipeline.tokenizer).from_pretrained(_saved(pipeline.tokenizer, tmp_path))
    assert add_token(pipeline, tmp_path / "style.safetensors", "<s>") == "<s>"
    torch.testing.assert_close(row_of(pipeline, "<s>", 0), rows["clip_l"][0])
    torch.testing.assert_close(row_of(pipeline, "<s>", 1), rows["clip_g"][0])
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(2, 16)}, tmp_path / "odd.safetensors")
    with raises_naming("1 and 2"):
        add_token(pipeline, tmp_path / "odd.safetensors", "<t>")


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_a_pickle_is_not_loaded_and_the_printed_conversion_works(pipeline, tmp_path):
    """A1111's own format. The message has a line of Python that converts it."""
    import safetensors.torch  # the printed line uses it

    rows = torch.randn(3, 32)
    file = tmp_path / "cat.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "cat", "step": 100}, file)
    with raises_naming("cat.pt", CONVERT):
        add_token(pipeline, file, "<cat>")
    assert "<cat>" not in pipeline.tokenizer.get_vocab()
    names = {"torch": torch, "safetensors": safetensors, "FILE": file, "NEW_FILE": tmp_path / "cat.safetensors"}
    exec(CONVERT.rstrip("."), names)
    add_token(pipeline, tmp_path / "cat.safetensors", "<cat>")
    torch.testing.assert_close(row_of(pipeline, "<cat>_2"), rows[2])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(value, pipeline, tmp_path):
    save_file({"<R>": torch.full((1, 32), value)}, tmp_path / "R.safetensors")
    with raises_naming("<R>"):
        add_token(pipeline, tmp_path / "R.safetensors")
    assert "<R>" not in pipeline.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (torch.tensor(1.0), "()"), (torch.ones(1, 1, 32), "(1, 1, 32)"), (torch.ones(0, 32), "(0, 32)"),
        (torch.ones(1, 32, dtype=torch.long), "<R>"), (torch.ones(40, 32), "40"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_an_embedding(tensor, named, pipeline, tmp_path):
    save_file({"<R>": tensor}, tmp_path / "R.safetensors")
    with raises_naming(named):
        add_token(pipeline, tmp_path / "R.safetensors")


def test_a_plain_word_cannot_be_the_name(pipeline, tmp_path):
    save_file({"cat": torch.ones(1, 32)}, tmp_path / "cat.safetensors")
    with raises_naming("'cat'"):
        add_token(pipeline, tmp_path / "cat.safetensors")
