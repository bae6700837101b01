"""LoRaD's angles: ranks through the factors alone, counts that lose no angle. Names of layers: kind and place."""

import math

import pytest
import torch

from wadi.analysis import angles
from wadi.analysis.kinds import KINDS, block, depth, kind


@pytest.mark.parametrize(("out", "r", "pairs"), [(30, 4, 20), (6, 9, 20), (20, 9, 6), (5, 5, 5)])
def test_singular_values_of_the_product_come_from_the_factors(out, r, pairs):
    generator = torch.Generator().manual_seed(out)
    A, B = torch.randn(out, r, generator=generator), torch.randn(r, pairs, generator=generator)
    found, whole = angles.singular_values(A, B), torch.linalg.svdvals(A.double() @ B.double())
    assert len(found) == min(out, r, pairs)
    torch.testing.assert_close(found, whole[: len(found)])
    assert whole[len(found) :].sum() < 1e-9


def test_effective_rank_of_known_spectra():
    assert angles.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert angles.effective_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)
    assert angles.effective_rank(torch.zeros(4)) == 0
    p = torch.tensor([0.7, 0.2, 0.1])
    assert angles.effective_rank(5 * p) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p.tolist())), rel=1e-6)


def test_the_statistics_of_the_angles_of_a_layer():
    A = torch.diag(torch.tensor([0.5, 0.12, 0.0]))
    theta = A @ torch.eye(3, 4)
    found = angles.describe(A, torch.eye(3, 4), theta)
    assert (found.rank, found.full, found.rank_99) == (3, 3, 2)
    assert found.rms == pytest.approx(math.sqrt((0.25 + 0.0144) / 12))
    assert (found.largest, found.beyond) == (pytest.approx(0.5), 0)
    occupied = {i for i, count in enumerate(found.counts) if count}
    assert sum(found.counts) == 12
    for value in (0.0, 0.12, 0.5):
        assert any(angles.EDGES[i] - 1e-6 <= value <= angles.EDGES[i + 1] + 1e-6 for i in occupied)


def test_angles_beyond_half_a_turn_are_counted_and_zero_has_no_rank():
    A, B = torch.tensor([[4.0], [-7.0], [1.0]]), torch.ones(1, 2)
    found = angles.describe(A, B, A @ B)
    assert found.beyond == pytest.approx(2 / 3)
    assert found.largest == 7
    assert (found.counts[0], found.counts[-1], sum(found.counts)) == (2, 2, 6)
    still = angles.describe(torch.zeros(3, 2), torch.ones(2, 4), torch.zeros(3, 4))
    assert (still.effective_rank, still.rank_99, still.rms, still.rank) == (0, 0, 0, 2)


NAMES = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": ("self-attention q", "down 1"),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": ("self-attention out", "mid"),
    "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k": ("cross-attention", "up 2"),
    "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0": ("cross-attention", "up 2"),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": ("feed-forward", "down 0"),
    "down_blocks.0.attentions.0.proj_in": ("projection", "down 0"),
    "down_blocks.0.resnets.1.conv_shortcut": ("convolution", "down 0"),
    "up_blocks.0.upsamplers.0.conv": ("convolution", "up 0"),
    "down_blocks.0.resnets.1.time_emb_proj": ("time", "down 0"),
    "time_embedding.linear_1": ("time", "outside"),
    "add_embedding.linear_2": ("time", "outside"),
    "conv_in": ("convolution", "outside"),
    "transformer_blocks.27.attn1.to_v": ("self-attention v", "block 27"),
    "transformer_blocks.27.attn2.to_v": ("cross-attention", "block 27"),
    "transformer_blocks.3.ff.net.2": ("feed-forward", "block 3"),
    "adaln_single.emb.timestep_embedder.linear_1": ("time", "outside"),
    "adaln_single.linear": ("time", "outside"),
    "caption_projection.linear_1": ("projection", "outside"),
    "pos_embed.proj": ("projection", "outside"),
    "proj_out": ("projection", "outside"),
    "transformer_blocks.5.attn.to_q": ("self-attention q", "block 5"),
    "transformer_blocks.5.attn.add_k_proj": ("text-stream attention", "block 5"),
    "transformer_blocks.5.attn.to_add_out": ("text-stream attention", "block 5"),
    "transformer_blocks.5.ff_context.net.2": ("feed-forward", "block 5"),
    "transformer_blocks.5.norm1_context.linear": ("time", "block 5"),
    "single_transformer_blocks.37.proj_mlp": ("feed-forward", "single 37"),
    "single_transformer_blocks.37.proj_out": ("feed-forward", "single 37"),
    "single_transformer_blocks.37.norm.linear": ("time", "single 37"),
    "time_text_embed.guidance_embedder.linear_1": ("time", "outside"),
    "norm_out.linear": ("time", "outside"),
    "context_embedder": ("projection", "outside"),
    "transformer_blocks.0.ff.conv_depth": ("feed-forward", "block 0"),
}


@pytest.mark.parametrize("name", NAMES)
def test_kind_and_block(name):
    assert (kind(name), block(name)) == NAMES[name]
    assert kind(name) in KINDS


def test_what_no_rule_knows():
    assert kind("head.mystery") == "other"
    assert kind("head.mystery", 4) == "convolution"


def test_depth_runs_from_input_to_output():
    names = [
        "up_blocks.0.a",
        "mid_block.a",
        "down_blocks.10.a",
        "down_blocks.2.a",
        "conv_in",
        "down_blocks.2.b.10",
        "down_blocks.2.b.9",
    ]
    in_order = [
        "conv_in",
        "down_blocks.2.a",
        "down_blocks.2.b.9",
        "down_blocks.2.b.10",
        "down_blocks.10.a",
        "mid_block.a",
        "up_blocks.0.a",
    ]
    assert sorted(names, key=depth) == in_order
    assert sorted(["single_transformer_blocks.0.x", "transformer_blocks.9.x"], key=depth)[0] == "transformer_blocks.9.x"
