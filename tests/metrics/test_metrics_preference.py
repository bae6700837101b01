"""Preference scores through transformers against the same networks written out in plain torch, on random weights."""

import pytest
import torch
import torch.nn.functional as F
from metric_toys import OpenClip, bert_tokenizer, blip, blip_state, head, head_state, pictures, shaken
from safetensors.torch import save_file

import tiny
from raising import raises_naming
from wadi.metrics import foreign, hub
from wadi.metrics.clip import MEAN, STD, load_clip, pad
from wadi.metrics.preference import REWARD_MEAN, REWARD_STD, aesthetic, hpsv2, image_reward, pickscore

PROMPTS = ["red apple", "blue car"]


def normalised(pixels):
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words")
    tokenizer = tiny.tokenizer(path / "parts")
    tokenizer.save_pretrained(path / "tokenizer")
    return path / "tokenizer"


@pytest.fixture(scope="module")
def openclip():
    return shaken(OpenClip(514, 16))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, openclip, words):
    from transformers import AutoTokenizer, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    model = CLIPModel(openclip.config())
    hub.load_into(model, foreign.openclip(openclip.state_dict()), "it")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(words).save_pretrained(path)
    return path


def embeddings(openclip, words, pixels):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(words)(PROMPTS, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return F.normalize(openclip.visual(normalised(pixels))), F.normalize(openclip.encode_text(tokens))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_hpsv2_is_the_cosine_of_its_openclip_network(openclip, words, tmp_path, suffix):
    weights = tmp_path / f"hps{suffix}"
    state = {name: tensor.contiguous() for name, tensor in openclip.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, weights) if suffix == ".pt" else save_file(state, weights)
    images = pictures(2, 20, 12)
    image, text = embeddings(openclip, words, torch.stack([pad(picture, 16) for picture in images]))
    found = hpsv2(weights, tokenizer=words, config=openclip.config())
    assert torch.allclose(found(images, PROMPTS).float(), (image * text).sum(1), atol=1e-5)
    assert (found(images, PROMPTS[::-1]).float() - (image * text).sum(1)).abs().min() > 1e-3
    assert (found.name, found.digest) == ("HPSv2", hub.digest(weights))


def test_the_name_of_a_checkpoint_says_which_hpsv2_it_is(openclip, words, tmp_path):
    """Both versions have the same tensors. A file with another name than the published ones has no version."""
    for name, version in (("HPS_v2_compressed.pt", "2.0"), ("HPS_v2.1_compressed.pt", "2.1")):
        torch.save({"state_dict": dict(openclip.state_dict())}, tmp_path / name)
        found = hpsv2(tmp_path / name, tokenizer=words, config=openclip.config())
        assert found.protocol()["network"] == f"HPSv{version}"
        with raises_naming(name, "2.0", "2.1"):
            hpsv2(tmp_path / name, "2.0" if version == "2.1" else "2.1", tokenizer=words, config=openclip.config())


def test_a_score_says_which_tokenizer_it_used(openclip, words, clip_folder, tmp_path):
    """Prompts become other tokens, and so other numbers."""

    other = tiny.tokenizer(tmp_path / "other")
    other.add_tokens(["apple"])
    other.save_pretrained(tmp_path / "other")
    one, two = pickscore(clip_folder, words), pickscore(clip_folder, tmp_path / "other")
    assert one.protocol()["digest"] == two.protocol()["digest"]
    assert one.protocol() != two.protocol()
    before = one.protocol()
    one(pictures(2, 16, 16), PROMPTS)  # padding and truncation of a call are no setting
    assert one.protocol() == before == pickscore(clip_folder, words).protocol()


def test_pickscore_is_the_scaled_cosine(openclip, words, clip_folder):
    images = pictures(2, 16, 16)
    image, text = embeddings(openclip, words, images / 255)
    expected = openclip.logit_scale.exp() * (image * text).sum(1)
    assert torch.allclose(pickscore(clip_folder, words)(images, PROMPTS).float(), expected, atol=1e-4)


def test_image_reward_is_its_own_networks_score(tmp_path):
    from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig

    vocabulary = bert_tokenizer(tmp_path / "bert")
    state = blip_state(vocabulary)
    torch.save(state, tmp_path / "reward.pt")
    shared = {"num_hidden_layers": 2}
    vision = BlipVisionConfig(
        hidden_size=24, intermediate_size=48, num_attention_heads=3, image_size=16, patch_size=8, layer_norm_eps=1e-6, **shared
    )
    text = BlipTextConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_attention_heads=2, encoder_hidden_size=24,
        max_position_embeddings=40, **shared,
    )  # fmt: skip
    found = image_reward(tmp_path / "reward.pt", tmp_path / "bert", vision=vision, text=text)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "bert")(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    assert tokens.attention_mask.sum(1).tolist() == [2 + 8, 2 + 7]
    images = pictures(2, 16, 16)
    hidden = blip(state, normalised(images / 255), tokens.input_ids, tokens.attention_mask, 3, 2)
    expected = (head(state, hidden[:, 0], "mlp.") - REWARD_MEAN) / REWARD_STD
    assert torch.allclose(found(images, PROMPTS).float(), expected, atol=1e-3)
    assert (found(images, PROMPTS[::-1]).float() - expected).abs().min() > 0.02
    assert (found(images.flip(0), PROMPTS).float() - expected).abs().min() > 0.02
    with raises_naming("blip.more"):
        foreign.image_reward(state | {"blip.more": torch.ones(1)})


def test_the_aesthetic_score_is_a_head_on_the_unit_embedding(openclip, words, clip_folder, tmp_path):
    torch.save(head_state(12), tmp_path / "head.pth")
    images = pictures(2, 16, 16)
    image, _ = embeddings(openclip, words, images / 255)
    found = aesthetic(tmp_path / "head.pth", clip_folder)
    assert torch.allclose(found(images, PROMPTS).float(), head(head_state(12), image), atol=1e-4)
    assert torch.equal(found(images, PROMPTS), found(images, ["other", "words"]))
    torch.save(head_state(13), tmp_path / "wider.pth")
    with raises_naming("wider.pth", "layers.0.weight"):
        aesthetic(tmp_path / "wider.pth", clip_folder)


def test_the_published_networks_have_their_sizes():
    """986 M in the CLIP of ViT-H/14, 303 M in ViT-L/16; BERT base without its pooler, 109 M, and 33 M of cross-attention."""
    from transformers import BlipTextModel, BlipVisionModel, CLIPModel

    from wadi.metrics.preference import _blip_text, _blip_vision, _vit_h_14

    with torch.device("meta"):
        built = (
            CLIPModel(_vit_h_14()),
            BlipVisionModel(_blip_vision()),
            BlipTextModel(_blip_text(1024), add_pooling_layer=False),
        )
    assert [round(sum(p.numel() for p in model.parameters()) / 1e6) for model in built] == [986, 303, 142]


def test_missing_and_wrong_weights_are_named(words, tmp_path, monkeypatch, openclip):
    monkeypatch.setenv("WADI_CACHE", str(tmp_path))
    for call, values in (
        (hpsv2, ["xswu/HPSv2"]),
        (image_reward, ["THUDM/ImageReward"]),
        (pickscore, ["yuvalkirstain/PickScore_v1"]),
        (aesthetic, ["https://", tmp_path / "sac+logos+ava1-l14-linearMSE.pth"]),
    ):
        with raises_naming(*values):
            call()
    with raises_naming("'3'", "2.0", "2.1"):
        hpsv2(version="3")
    state = openclip.state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "part.pt")
    with raises_naming("part.pt", "visual_projection.weight"):
        hpsv2(tmp_path / "part.pt", tokenizer=words, config=openclip.config())


def test_prompts_and_images_must_pair_and_scores_be_finite(clip_folder, words):
    from dataclasses import replace

    score = pickscore(clip_folder, words)
    with raises_naming("2 images", "1 prompts"):
        score(pictures(2, 16, 16), ["red apple"])
    with raises_naming("NaN"):
        replace(score, score=lambda images, prompts: torch.full((len(images),), torch.nan))(pictures(2, 16, 16), PROMPTS)


def test_clips_digest_follows_the_weights(clip_folder):
    assert load_clip(clip_folder).digest == hub.digest(load_clip(clip_folder).model)
