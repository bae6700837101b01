"""The cache of prompt embeddings: equal to the encoder's output bit for bit, resumed, and checked against the encoder."""

import json
import shutil

import diffusers.utils
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tiny
from backbones import small_pipelines
from raising import raises_naming
from runs import assert_same_run
from wadi.backbones import Condition, from_pipeline, load_pipeline
from wadi.distill.conditions import Conditions, conditions_of, encoder_identity, free_encoders
from wadi.distill.embed_prompts import embed_prompts
from wadi.errors import WadiError
from wadi.prompts import cache as cache_module
from wadi.prompts.cache import Embeddings, shard_path, used_tokens, write_manifest, write_shard
from wadi.prompts.reading import open_prompts

TEXTS = ["red apple", "blue car", "a green tree", "yellow sun", "ночь"]


@pytest.fixture(scope="module")
def backbone(sd_folder):
    return from_pipeline(load_pipeline(sd_folder))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(TEXTS))
    return open_prompts(path)


@pytest.fixture
def cache(backbone, prompts, tmp_path):
    return embed_prompts(backbone, prompts, tmp_path / "cache", batch=2, shard_rows=2)


def test_rows_are_what_the_encoder_gives(backbone, prompts, cache):
    found = Embeddings(cache)
    assert list(found) == TEXTS
    assert found.digest == prompts.digest
    assert len(list(cache.glob("shard-*"))) == 3
    rows = torch.tensor([4, 0, 3, 0])
    read, encoded = conditions_of(backbone, found)(rows), conditions_of(backbone, prompts)(rows)
    assert read.tensors.keys() == encoded.tensors.keys()
    for name, value in encoded.tensors.items():
        assert read.tensors[name].dtype == value.dtype
        assert_close(read.tensors[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError):
        found[5]


def same(one, other):
    """Return whether two caches have the same contents; the order of entries in a header may differ."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert (one / cache_module.MANIFEST).read_text() == (other / cache_module.MANIFEST).read_text()
    for name in names[1:]:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    return True


def condition(mask=None):
    embeds = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"prompt_embeds": embeds, "pooled": torch.randn(3, 6), "size": torch.ones(3, 2)}
    return tensors | ({"mask": mask} if mask is not None else {})


def stored(tensors, folder):
    shapes = {name: list(value.shape[1:]) for name, value in tensors.items()}
    manifest = {"encoder": {"a": "b"}, "prompts": "digest", "count": 3, "shard_rows": 3, "shapes": shapes}
    write_manifest(folder, manifest)
    write_shard(shard_path(folder, 0), ["x", "", "long one"], tensors, cache_module.cache_identity(manifest))
    return Embeddings(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_tokens_are_not_stored_and_come_back_as_zeros(dtype, tmp_path):
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1] * 6])
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition(mask).items()}
    found = stored(tensors, tmp_path)
    assert used_tokens(tensors).tolist() == [2, 3, 6]
    back = found.rows([0, 1, 2])
    assert {name: value.dtype for name, value in back.items()} == {name: value.dtype for name, value in tensors.items()}
    assert all(torch.equal(back[name], tensors[name]) for name in ("pooled", "size", "mask"))
    visible = torch.arange(6) < torch.tensor([[2], [3], [6]])
    assert torch.equal(back["prompt_embeds"], tensors["prompt_embeds"] * visible.unsqueeze(-1))
    assert list(found) == ["x", "", "long one"]
    size = shard_path(tmp_path, 0).stat().st_size
    whole = stored(condition(torch.ones(3, 6, dtype=torch.long)), tmp_path / "whole")
    assert size < shard_path(whole.folder, 0).stat().st_size


def test_without_a_mask_only_zeros_are_cut(tmp_path):
    tensors = condition()
    tensors["prompt_embeds"][1, 4:] = 0
    found = stored(tensors, tmp_path)
    assert used_tokens(tensors).tolist() == [6, 4, 6]
    assert all(torch.equal(value, tensors[name]) for name, value in found.rows([0, 1, 2]).items())


def test_a_network_that_masks_does_not_see_the_difference(tmp_path):
    """Cut tokens come back as zeros, and the prediction is the same bit for bit."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4, patch_size=2,
        caption_channels=4, cross_attention_dim=16, norm_num_groups=1, use_additional_conditions=False,
    ).eval()  # fmt: skip
    tensors = condition(torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1] * 6]))
    back = stored(tensors, tmp_path).rows([0, 1, 2])
    x_t = torch.randn(3, 4, 4, 4)

    def predict(inputs):
        return network(
            x_t, encoder_hidden_states=inputs["prompt_embeds"], encoder_attention_mask=inputs["mask"],
            timestep=torch.tensor([5, 6, 7]), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip

    assert not torch.equal(back["prompt_embeds"], tensors["prompt_embeds"])
    with torch.no_grad():
        assert torch.equal(predict(back), predict(tensors))


def test_an_interrupted_cache_goes_on_where_it_stopped(backbone, prompts, cache, tmp_path, monkeypatch):
    encoded, plain = [], backbone.encode

    def encode(texts):
        encoded.append(list(texts))
        if len(encoded) == 3:  # the first tells shapes
            raise KeyboardInterrupt
        return plain(texts)

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "encode", encode)
        with pytest.raises(KeyboardInterrupt):
            embed_prompts(backbone, prompts, tmp_path / "broken", batch=2, shard_rows=2)
        with raises_naming("broken", "shard-00001", "wadi embed"):
            Embeddings(tmp_path / "broken")
        embed_prompts(backbone, prompts, tmp_path / "broken", batch=2, shard_rows=2)
        assert encoded[3:] == [TEXTS[:1], TEXTS[2:4], TEXTS[4:]]
    assert same(cache, tmp_path / "broken")


def test_damaged_shards_are_named_and_written_again(backbone, prompts, cache, tmp_path):
    whole = shutil.copytree(cache, tmp_path / "whole")
    good = {path: path.read_bytes() for path in cache.iterdir()}
    shard_path(cache, 0).write_bytes(good[shard_path(cache, 0)][:-10])
    shard_path(cache, 1).write_bytes(good[shard_path(cache, 2)])
    with raises_naming("shard-00000", "damaged"):
        Embeddings(cache)
    embed_prompts(backbone, prompts, cache, batch=2, shard_rows=2)
    assert same(cache, whole)
    (cache / cache_module.MANIFEST).write_text("{}")
    with pytest.raises(WadiError, match=r"cache\.json"):
        Embeddings(cache)


def test_a_cache_of_another_encoder_is_an_error(cache, prompts, backbone, tmp_path, sd_folder):
    other = tiny.stable_diffusion(tmp_path / "words")
    with torch.no_grad():
        next(other.text_encoder.parameters())[0, 0] += 1
    half = load_pipeline(sd_folder, torch.float16)
    cases = ((from_pipeline(other), "text_encoder"), (from_pipeline(half), "float16"))
    for stranger, named in cases:
        for use in (lambda b: conditions_of(b, Embeddings(cache)), lambda b: embed_prompts(b, prompts, cache)):
            with raises_naming(cache, named):
                use(stranger)
    conditions_of(from_pipeline(load_pipeline(sd_folder)), Embeddings(cache))  # loaded anew it is the same
    conditions_of(from_pipeline(load_pipeline(sd_folder), (32, 16)), Embeddings(cache))  # this encoder does not know the size


def test_a_condition_that_contains_the_size_is_of_this_size(tmp_path, prompts):
    pipeline = small_pipelines.make("sdxl", tmp_path)
    cache = embed_prompts(from_pipeline(pipeline, (64, 64)), prompts, tmp_path / "cache")
    conditions_of(from_pipeline(pipeline, (64, 64)), Embeddings(cache))
    with raises_naming(cache, "resolution", 32):
        conditions_of(from_pipeline(pipeline, (32, 64)), Embeddings(cache))


def test_whether_captions_were_cleaned_is_in_the_cache(tmp_path, prompts, monkeypatch):
    backbone = from_pipeline(small_pipelines.make("pixart-alpha", tmp_path), (64, 64))
    identities = []
    for available in (False, True):
        for name in ("is_bs4_available", "is_ftfy_available"):
            monkeypatch.setattr(diffusers.utils, name, lambda available=available: available)
        identities.append(encoder_identity(backbone))
    with raises_naming("clean_caption"):
        cache_module.check_encoder(tmp_path, *identities)
    earlier = {name: value for name, value in identities[0].items() if name != "arguments"}
    cache_module.check_encoder(tmp_path, earlier, identities[1])  # a cache of an earlier version does not say


def test_a_cache_of_other_prompts_is_not_overwritten(backbone, cache, tmp_path):
    (tmp_path / "q.txt").write_text("one\ntwo")
    others = open_prompts(tmp_path / "q.txt")
    with raises_naming(cache, "prompts, count"):
        embed_prompts(backbone, others, cache, shard_rows=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with raises_naming("mine"):
        embed_prompts(backbone, others, tmp_path / "mine")
    with pytest.raises(WadiError, match="batch"):
        embed_prompts(backbone, others, tmp_path / "new", batch=0)


def test_a_full_disk_keeps_the_shards_before(backbone, prompts, tmp_path, full_disk):
    with full_disk(2500), raises_naming(tmp_path / "cache"):
        embed_prompts(backbone, prompts, tmp_path / "cache", batch=2, shard_rows=2)
    assert not list((tmp_path / "cache").glob(".*"))
    embed_prompts(backbone, prompts, tmp_path / "cache", batch=2, shard_rows=2)
    assert list(Embeddings(tmp_path / "cache")) == TEXTS


def test_encoders_are_let_go(sd_folder):
    import gc
    import weakref

    own = from_pipeline(load_pipeline(sd_folder))
    known, encoder = encoder_identity(own), weakref.ref(own.pipeline.text_encoder)
    assert "text_encoder" in known
    free_encoders(own)
    gc.collect()
    assert encoder() is None
    assert isinstance(own.decode(torch.zeros(1, *own.latent_shape)), torch.Tensor)


def test_the_encoder_receives_batches(backbone, prompts, tmp_path, monkeypatch):
    sizes, plain = [], backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda texts: sizes.append(len(texts)) or plain(texts))
    assert isinstance(Conditions(backbone, prompts)([0, 1, 2, 3]), Condition)
    assert sizes == [4]
    manifest = json.loads((embed_prompts(backbone, prompts, tmp_path / "c", batch=3) / "cache.json").read_text())
    assert sizes == [4, 1, 3, 2]
    assert manifest["count"] == 5


def test_training_from_a_cache_is_training_without_bit_for_bit(sd_folder, prompts_path, tmp_path, monkeypatch):
    """And the encoder is gone by the first step."""
    from wadi.cli.main import main
    from wadi.distill import loop

    command = ["embed", "--teacher", str(sd_folder), "--prompts", str(prompts_path), "--out", str(tmp_path / "cache")]
    assert main([*command, "--batch", "2", "--device", "cpu"]) == 0
    plain, encoders = loop.train_step, []

    def train_step(backbone, *arguments):
        encoders.append(backbone.pipeline.text_encoder)
        return plain(backbone, *arguments)

    monkeypatch.setattr(loop, "train_step", train_step)
    sources = {"encoded": prompts_path, "cached": tmp_path / "cache"}
    runs = [loop.distill(tiny.settings(sd_folder, source, tmp_path / name)) for name, source in sources.items()]
    assert_same_run(*runs)
    assert [encoder is None for encoder in encoders] == [False] * 3 + [True] * 3


def test_a_run_does_not_go_on_with_other_prompts(sd_folder, tmp_path):
    from wadi.distill.loop import distill

    prompts = tmp_path / "p.txt"
    prompts.write_text("red apple\nblue car\n")
    config = tiny.settings(sd_folder, prompts, tmp_path / "run", steps=2, checkpoint_every=1)
    distill(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000002")
    prompts.write_text("red apple\nblue cat\n")
    with raises_naming("step-0000001"):
        distill(config)


@pytest.mark.parametrize("change", [{"text_encoder_2": "ab float32"}, {"text_encoder": None}, {"tokenizer": "x 77"}])
def test_an_encoder_that_only_one_of_the_two_has_makes_a_cache_stale(change, tmp_path):
    cached = {"family": "SD", "text_encoder": "cd float32", "resolution": [16, 16]}
    teacher = {name: value for name, value in {**cached, **change}.items() if value is not None}
    cache_module.check_encoder(tmp_path, cached, dict(cached))
    for found, expected in ((cached, teacher), (teacher, cached)):
        with pytest.raises(WadiError, match=next(iter(change))):
            cache_module.check_encoder(tmp_path, found, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": -1}, ("'count'", "-1")),
        ({"shard_rows": 0}, ("'shard_rows'", "0")),
        ({"shapes": {"prompt_embeds": [77, "x"]}}, ("shapes",)),
        ({"encoder": []}, ("'encoder'",)),
        ({"prompts": 5}, ("'prompts'", "5")),
    ],
)
def test_the_manifest_is_typed(change, words, tmp_path):
    manifest = {"encoder": {}, "prompts": "ab", "count": 3, "shard_rows": 2, "shapes": {"prompt_embeds": [77, 8]}}
    cache_module.write_manifest(tmp_path, manifest)
    assert cache_module.read_manifest(tmp_path) == manifest
    cache_module.write_manifest(tmp_path, manifest | change)
    with pytest.raises(WadiError) as error:
        cache_module.read_manifest(tmp_path)
    assert all(word in str(error.value) for word in (*words, "cache.json"))
