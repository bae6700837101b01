"""The CLIP score on a small random CLIP of the real class."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from metric_toys import OpenClip, pictures, shaken
from PIL import Image

import tiny
from raising import raises_naming
from wadi.metrics.clip import MEAN, STD, cosines, crop, load_clip, pad, similarities

PROMPTS = ["red apple", "blue car", "a very long prompt that has more letters than tokens fit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPModel

    path = tmp_path_factory.mktemp("clip")
    words = tiny.tokenizer(path / "words")
    words.save_pretrained(path / "clip")
    torch.manual_seed(0)
    CLIPModel(OpenClip(len(words), 16).config()).save_pretrained(path / "clip")
    return path / "clip"


def test_is_the_cosine_of_what_the_model_itself_calls_its_embeddings(folder):
    """transformers' own forward divides by the norms too: its logits over its scale are the cosines."""
    clip = load_clip(folder)
    images = pictures(3, 16, 16)
    tokens = clip.tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        out = clip.model(**tokens, pixel_values=pixels)
    expected = (out.logits_per_image / clip.model.logit_scale.exp()).diagonal()
    found = similarities(images, PROMPTS, clip)
    assert torch.allclose(found.float(), expected, atol=1e-5)


def test_the_score_of_a_pair_does_not_depend_on_the_others(folder):
    clip = load_clip(folder)
    images = pictures(3, 20, 24)
    together = similarities(images, PROMPTS, clip)
    alone = [similarities(images[i : i + 1], PROMPTS[i : i + 1], clip) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert not torch.allclose(together, similarities(images, PROMPTS[::-1], clip), atol=1e-3)


def test_cosines_do_not_depend_on_length():
    x, y = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cosines(3 * x, 0.2 * y), F.normalize(x.double()).mul(F.normalize(y.double())).sum(1))
    assert torch.allclose(cosines(x, -x), -torch.ones(5).double())


def test_the_models_own_normalisation_counts(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "other")
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.5, 1.0]
    about = {"image_processor_type": "CLIPImageProcessor", "image_mean": mean, "image_std": std}
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(about))
    other, plain = load_clip(tmp_path / "other"), load_clip(folder)
    assert (other.mean, other.std) == (tuple(mean), tuple(std))
    assert other.digest == plain.digest
    assert other.protocol() != plain.protocol() | {"network": other.name}
    assert not torch.allclose(other.embed_images(pictures(1, 16, 16)), plain.embed_images(pictures(1, 16, 16)), atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 50), (70, 31), (16, 16), (9, 20)])
def test_images_are_cropped_as_transformers_crops_them(height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_normalize=False)
    picture = pictures(1, height, width)[0]
    expected = processor(Image.fromarray(picture.permute(1, 2, 0).numpy()), return_tensors="np").pixel_values[0]
    assert np.abs(crop(picture, 16).numpy() - expected).max() < 1e-6


def test_padding_keeps_the_whole_image_and_its_middle():
    white = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    found = pad(white, 16)
    assert found.shape == (3, 16, 16)
    assert torch.allclose(found[:, 4:12], torch.ones(3, 8, 16), atol=1e-5)
    assert found[:, :4].eq(0).all()
    assert found[:, 12:].eq(0).all()
    assert torch.equal(pad(pictures(1, 16, 16)[0], 16), pictures(1, 16, 16)[0] / 255)


def test_bad_input_is_named(folder):
    clip = load_clip(folder)
    with raises_naming("3 images", "2 prompts"):
        similarities(pictures(3, 16, 16), PROMPTS[:2], clip)
    with raises_naming("0 images"):
        similarities([], [], clip)
    with raises_naming("NaN"):
        cosines(torch.full((2, 3), torch.nan), torch.ones(2, 3))
    with raises_naming("nobody/nothing", "CLIP"):
        load_clip("nobody/nothing")


def test_an_openclip_model_is_the_same_under_transformers_names(folder):
    """Every tensor finds its place: the embeddings of both are equal to rounding."""
    from transformers import CLIPModel

    from wadi.metrics import foreign, hub

    theirs = shaken(OpenClip(514, 16))
    ours = CLIPModel(theirs.config()).eval()
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    hub.load_into(ours, foreign.openclip(state), "it")
    tokens = torch.tensor([[512, 5, 9, 513, 513], [512, 7, 513, 513, 513]])
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = ours.visual_projection(ours.vision_model(pixels).pooler_output)
        texts = ours.text_projection(ours.text_model(tokens).pooler_output)
        assert torch.allclose(images, theirs.visual(pixels), atol=1e-4)
        assert torch.allclose(texts, theirs.encode_text(tokens), atol=1e-4)
    with raises_naming("'visual.trunk.stem'", "open_clip"):
        foreign.openclip({"visual.trunk.stem": torch.ones(1)})
    with raises_naming("ls_1"):
        foreign.openclip({"visual.transformer.resblocks.0.ls_1.weight": torch.ones(1)})


def test_the_protocol_tells_tokenizer_and_settings(folder, tmp_path):
    """Two CLIPs with the same tensors are another network if one has another activation."""
    import shutil

    plain = load_clip(folder)
    shutil.copytree(folder, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0", "_name_or_path": "x"}))
    other = load_clip(tmp_path / "clip")
    assert other.digest != plain.digest
    config["vision_config"].pop("hidden_act")
    shutil.copy(folder / "config.json", tmp_path / "clip" / "config.json")
    assert load_clip(tmp_path / "clip").digest == plain.digest
    assert len(plain.protocol()["tokenizer"]) == 64


@pytest.mark.parametrize("mean", ['"x"', "[1]", "[1, 2, NaN]", "null", "3"])
def test_absurd_normalisations_are_named(folder, tmp_path, mean):
    import shutil

    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(f'{{"image_mean": {mean}}}')
    with raises_naming("image_mean"):
        load_clip(tmp_path / "clip")
