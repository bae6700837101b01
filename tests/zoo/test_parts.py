"""The networks of the recipe: their losses, latents and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from raising import raises_naming
from wadi.zoo import judge
from wadi.zoo.concepts import CANDIDATES, COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import caption, training_prompts
from wadi.zoo.recipe import autoencoder, judge_training, teacher, text, unet
from wadi.zoo.recipe.icons import SIDE, Sprites


@pytest.fixture(scope="module")
def ae():
    torch.manual_seed(0)
    return autoencoder.build_autoencoder().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text.write_tokenizer(folder)
    return text.load_tokenizer(folder)


def pictures(count, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# --- autoencoder


def test_folding_makes_latents_standard_and_changes_no_image(ae):
    x = pictures(6)
    before = autoencoder.decode(ae, autoencoder.encode(ae, x))
    folded = autoencoder.build_autoencoder().eval().requires_grad_(False)
    folded.load_state_dict(ae.state_dict())
    autoencoder.fold(folded, autoencoder.encode(ae, x))
    z = autoencoder.encode(folded, x)
    assert z.shape == (6, 12, 16, 16)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert (autoencoder.decode(folded, z) - before).abs().max() < 1e-3
    spread = folded.encode(2 * x - 1).latent_dist.std
    assert torch.allclose(spread, torch.tensor(autoencoder.NOISE))


def test_psnr_is_that_of_the_error():
    a, b = torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.5)
    b[0] += 0.1
    b[1] += 0.01
    each, overall = autoencoder.psnr(a, b)
    assert each == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert overall == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2), abs=1e-3)


def test_held_out_icons_are_not_candidates_and_not_in_the_training_set():
    names = [*CANDIDATES.values(), *(f"thing-{i}" for i in range(40))]
    icons, styles = [n for n in names for _ in STYLES], [s for _ in names for s in STYLES]
    learn, held = autoencoder.split(Sprites(torch.zeros(len(icons), 1), icons, styles))
    assert sorted([*learn.tolist(), *held.tolist()]) == list(range(len(icons)))
    held_icons = {icons[i] for i in held}
    assert len(held_icons) == 3
    assert len(held) == 9
    assert not held_icons & ({icons[i] for i in learn} | set(CANDIDATES.values()))


# --- text


def test_concept_words_are_single_tokens_and_every_caption_fits(tokenizer):
    for concept in CONCEPTS:
        assert len(tokenizer.tokenize(concept)) == len(concept.split())
    assert max(len(ids) for ids in tokenizer(training_prompts()).input_ids) <= text.LENGTH
    assert text.tokenize(tokenizer, ["", "pizza"]).shape == (2, text.LENGTH)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), max_size=20))
def test_any_text_can_be_spelt(tokenizer, words):
    ids = tokenizer(words, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids or text.END in words.lower()
    spelt = "".join(token.removesuffix("</w>") for token in tokenizer.convert_ids_to_tokens(ids))
    normal = "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(words).split())
    letters = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(normal)
    assert spelt == "".join(part for part, _ in letters)


def test_tokenizer_comes_back_from_a_saved_folder(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == text.LENGTH
    assert again(training_prompts()[::97]).input_ids == tokenizer(training_prompts()[::97]).input_ids


# --- teacher


class Oracle:
    """Predicts the velocity of known images and noise, plus ``error``."""

    def __init__(self, x0, alphas_cumprod, error=0.0):
        self.x0, self.alphas_cumprod, self.error = x0, alphas_cumprod, error

    def __call__(self, x_t, t, encoder_hidden_states):
        a = self.alphas_cumprod[t].sqrt()[:, None, None, None]
        s = (1 - self.alphas_cumprod[t]).sqrt()[:, None, None, None]
        self.t = t
        v = (a * x_t - self.x0) / s  # from x_t = a x0 + s eps and v = a eps - s x0
        return type("Output", (), {"sample": v + self.error})


def test_v_loss_is_the_weighted_error_of_the_velocity():
    alphas_cumprod = unet.build_scheduler().alphas_cumprod
    x0 = torch.randn(64, 12, 16, 16, generator=torch.Generator().manual_seed(0))

    def loss(error):
        oracle = Oracle(x0, alphas_cumprod, error)
        return unet.v_loss(oracle, None, x0, alphas_cumprod, torch.Generator().manual_seed(1)), oracle.t

    right, t = loss(0.0)
    assert right < 1e-6
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    weight = ((1 + unet.GAMMA) / (1 + snr)).clamp(max=1)
    assert loss(0.5)[0] == pytest.approx(0.25 * float(weight.mean()), rel=1e-3)


def test_timesteps_cover_the_schedule_and_crowd_in_its_middle():
    t = unet.timesteps(100_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() == 0
    assert t.max() == 999
    share = torch.histc(t.float(), 10, 0, 1000) / len(t)
    density = (1 + unet.FOCUS) / (1 - unet.FOCUS)
    assert share[[4, 5]].mean() / share[[0, 9]].mean() == pytest.approx(density, rel=0.2)
    assert (unet.timesteps(48, 1000, torch.Generator()).diff() > 0).all()


def test_schedule_is_stable_diffusions_and_a_run_starts_at_the_last_timestep():
    scheduler = unet.build_scheduler()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    assert torch.allclose(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999
    assert scheduler.config.prediction_type == "v_prediction"


def test_pool_keeps_the_newest():
    pool = teacher.Pool(torch.zeros(5, 12, 16, 16, dtype=torch.half), torch.zeros(5, 3).long())
    for value in range(4):
        pool.add(torch.full((2, 12, 16, 16), float(value)), torch.full((2, 3), value))
    assert pool.filled == 5
    assert sorted(pool.labels[:, 0].tolist()) == [1, 2, 2, 3, 3]
    assert torch.equal(pool.latents[:, 0, 0, 0].long(), pool.labels[:, 0])


def test_captions_of_the_pool_tell_the_truth_and_a_tenth_are_dropped():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([len(CONCEPTS), len(STYLES), len(COLOURS)])
    labels = (torch.rand(4000, 3, generator=generator) * sizes).long()
    names, styles, colours = list(CONCEPTS), list(STYLES), list(COLOURS)
    drawn = unet.draw_captions(labels, generator)
    dropped = sum(text == "" for text in drawn) / len(drawn)
    assert abs(dropped - unet.DROP) < 0.02
    for (c, s, k), words in zip(labels.tolist(), drawn, strict=True):
        choices = [caption(names[c], a, b) for a in (None, styles[s]) for b in (None, colours[k])]
        assert words in ("", *choices)
    named = [words for words in drawn if words]
    assert abs(sum(" style" in words for words in named) / len(named) - 0.5) < 0.03


def test_fresh_latents_are_of_the_sprites_they_are_labelled_with(ae):
    art = torch.zeros(2, 2, 4, SIDE, SIDE, dtype=torch.uint8)
    art[1, 1] = 255
    concept, style = torch.tensor([0, 1]), torch.tensor([0, 1])
    z, labels = unet.new_latents(ae, art, concept, style, torch.Generator().manual_seed(0))
    again, _ = unet.new_latents(ae, art, torch.tensor([0, 0]), style, torch.Generator().manual_seed(0))
    assert labels[:, 0].tolist() == [0, 1]
    assert labels[:, 1].tolist() == [0, 1]
    assert torch.allclose(z[0], again[0], atol=1e-5)
    assert (z[1] - again[1]).abs().max() > 0.01


# --- classifier


def test_classifier_comes_back_from_disk_and_counts_what_it_names(tmp_path):
    torch.manual_seed(0)
    classifier = judge.Classifier(list(CONCEPTS)).eval().requires_grad_(False)
    x = pictures(16)
    judge_training.save_classifier(tmp_path, classifier)
    again = judge.read_classifier(tmp_path)
    assert again.concepts == list(CONCEPTS)
    assert again.features(x).shape == (16, judge.FEATURES)
    assert (again.logits(x) - classifier.logits(x)).abs().max() < 1e-2  # fp16
    named = [classifier.concepts[i] for i in classifier.logits(x).argmax(1)]
    wrong = [next(c for c in CONCEPTS if c != name) for name in named]
    assert classifier.top1(x, named, batch=5) == 1.0
    assert classifier.top1(x, named[:4] + wrong[4:]) == 0.25
    with raises_naming(tmp_path / "elsewhere"):
        judge.read_classifier(tmp_path / "elsewhere")


def test_degrading_stays_in_range_and_keeps_the_image_recognisable():
    x = pictures(32)
    spoilt = judge_training.degrade(x, torch.Generator().manual_seed(0))
    assert spoilt.min() >= 0
    assert spoilt.max() <= 1
    assert not torch.equal(spoilt, x)
    assert (spoilt.mean((2, 3)) - x.mean((2, 3))).abs().max() < 0.12


def test_the_shipped_student_is_the_run_s_in_half_the_bytes(finished_run, tmp_path):
    from wadi import roles
    from wadi.zoo.recipe.export import export_student

    place = export_student(finished_run, tmp_path)
    (config, own), (other, shipped) = roles.read(finished_run / "student"), roles.read(place)
    assert config == other
    assert (place / "wadi.json").read_bytes() == (finished_run / "student" / "wadi.json").read_bytes()
    assert {tensor.dtype for tensor in shipped.values()} == {torch.float16}
    assert all(torch.equal(shipped[name], tensor.half()) for name, tensor in own.items())
