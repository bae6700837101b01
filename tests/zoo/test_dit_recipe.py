"""The recipe of the DiT teacher: its scenes, captions, loss and judge, and its training from sprites to card."""

import json
import signal

import pytest
import torch
from zoo_toys import OTHERS

from raising import raises_naming
from wadi.backbones import from_pipeline, load_pipeline
from wadi.errors import Interrupted
from wadi.zoo import judge
from wadi.zoo.concepts import CANDIDATES, COLOURS, CONCEPTS, STYLES
from wadi.zoo.prompts import caption, concepts_of, eval_pair_prompts, pair, training_prompts
from wadi.zoo.recipe import autoencoder, dit, judge_training, kinds, scenes, stages, t5_text, teacher
from wadi.zoo.recipe.config import ZooConfig
from wadi.zoo.recipe.icons import SIDE, Sprites, save_sprites

NAMES, STYLE_NAMES, COLOUR_NAMES = list(CONCEPTS), list(STYLES), list(COLOURS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    t5_text.write_tokenizer(folder)
    return t5_text.load_tokenizer(folder)


# --- scenes


def art():
    """A full square for every sprite: concept ``i`` has red ``i + 1``, and every style the same."""
    sprites = torch.zeros(len(CONCEPTS), len(STYLES), 4, SIDE, SIDE, dtype=torch.uint8)
    sprites[:, :, 0] = torch.arange(1, len(CONCEPTS) + 1)[:, None, None, None].byte()
    sprites[:, :, 3] = 255
    return sprites


def test_labels_are_of_one_thing_or_of_two_different_ones():
    labels = scenes.random_labels(20_000, generator())
    first, second, style, colour = labels.unbind(1)
    two = second >= 0
    assert abs(two.float().mean() - scenes.PAIRS) < 0.02
    assert (first != second).all()
    for column, count in ((first, len(CONCEPTS)), (second[two], len(CONCEPTS)), (style, len(STYLES)), (colour, len(COLOURS))):
        assert sorted(set(column.tolist())) == list(range(count))


def test_a_scene_shows_what_its_label_says():
    labels = torch.tensor([[4, -1, 0, 0], [10, 90, 1, 0], [90, 10, 2, 0]])
    red = 255 * scenes.random_scenes(art(), labels, generator())[:, 0]
    shown = [{i for i in (5, 11, 91) if ((image - i).abs() < 0.5).sum() > 100} for image in red]
    assert shown == [{5}, {11, 91}, {91, 11}]


def test_two_things_stay_inside_and_mostly_apart():
    front, behind = scenes.random_pair_of_poses(5000, generator())
    boxes = []
    for theta in (front, behind):
        size = 1 / theta[:, 0, 0]
        centre = -theta[:, :, 2] * size[:, None]
        assert size.min() >= scenes.SMALLEST - 1e-6
        assert size.max() <= scenes.LARGEST + 1e-6
        assert (centre.abs() + size[:, None]).max() <= 1 + 1e-5
        boxes.append((centre, size))
    (a, s), (b, r) = boxes
    common = (
        (torch.minimum(a + s[:, None], b + r[:, None]) - torch.maximum(a - s[:, None], b - r[:, None])).clamp_min(0).prod(1)
    )
    share = common / (2 * torch.minimum(s, r)) ** 2
    assert share.mean() < 0.2
    assert share.max() < 0.6
    apart = a - b
    for axis in (0, 1):  # on either side, and above or below
        assert (apart[:, axis] > 0.3).float().mean() + (apart[:, axis] < -0.3).float().mean() > 0.3


def test_captions_name_both_things_in_order_and_a_tenth_are_empty():
    labels = scenes.random_labels(3000, generator())
    drawn = scenes.captions(labels, generator(1), drop=0.1)
    assert abs(drawn.count("") / len(drawn) - 0.1) < 0.02
    for (i, j, s, k), text in zip(labels.tolist(), drawn, strict=True):
        things = NAMES[i] if j < 0 else pair(NAMES[i], NAMES[j])
        allowed = [caption(things, a, b) for a in (None, STYLE_NAMES[s]) for b in (None, COLOUR_NAMES[k])]
        assert text in ("", *allowed)
        if text:
            assert concepts_of(text) == [NAMES[i]] + ([NAMES[j]] if j >= 0 else [])


def test_the_prompts_of_pairs_are_fixed_and_name_two_things():
    rows = eval_pair_prompts()
    assert rows == eval_pair_prompts()
    assert len({seed for _, _, seed in rows}) == len(rows)
    assert all(concepts_of(prompt) == list(two) and two[0] != two[1] for prompt, two, _ in rows)


# --- text


def test_each_word_of_a_caption_is_one_token_and_any_text_can_be_spelt(tokenizer):
    for prompt in (*training_prompts()[::50], "panda and lemon, on a pink background"):
        ids, mask = t5_text.tokenize(tokenizer, [prompt])
        assert ids.shape[1] == len(prompt.replace(",", " ,").split()) + 1  # and the end
        assert mask.all()
    spelt = t5_text.tokenize(tokenizer, ["Zebra crossing 9!"])[0]
    assert tokenizer.unk_token_id not in spelt
    assert t5_text.tokenize(tokenizer, [""])[0].tolist() == [[tokenizer.eos_token_id]]


def test_padding_does_not_change_what_the_network_predicts(tokenizer):
    """Training pads to the longest caption of a batch, a call of the pipeline to 120 tokens."""
    torch.manual_seed(0)
    kind = dit.DiTTeacher()
    model = kind.build(tokenizer).eval()
    torch.nn.init.normal_(model["transformer"].proj_out.weight, std=0.1)
    pipe = kind.assemble(autoencoder.build_autoencoder(), model, tokenizer)
    backbone = from_pipeline(pipe)
    x_t, t = torch.randn(1, *backbone.latent_shape, generator=generator()), torch.tensor([500])
    prompt = "panda and lemon"
    ids, mask = t5_text.tokenize(tokenizer, [prompt])
    with torch.no_grad():
        own = model["transformer"](
            x_t, encoder_hidden_states=model["text_encoder"](ids, attention_mask=mask)[0], encoder_attention_mask=mask,
            timestep=t, added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
        condition = backbone.encode([prompt])
        assert condition.tensors["mask"].shape == (1, 120)
        torch.testing.assert_close(backbone.predict(x_t, t, condition), own, rtol=1e-4, atol=1e-4)
    assert backbone.process.prediction == "epsilon"


# --- loss


class Oracle:
    """Predicts the noise of known images, plus ``error``."""

    def __init__(self, x0, alphas_cumprod, error):
        self.x0, self.alphas_cumprod, self.error = x0, alphas_cumprod, error

    def __call__(self, x_t, timestep, **inputs):
        power = self.alphas_cumprod[timestep][:, None, None, None]
        self.t = timestep
        return type("Output", (), {"sample": (x_t - power.sqrt() * self.x0) / (1 - power).sqrt() + self.error})


def test_the_loss_is_the_weighted_error_of_the_noise():
    alphas_cumprod = dit.build_scheduler().alphas_cumprod
    assert alphas_cumprod[-1].rsqrt() == pytest.approx(157, abs=1)  # PixArt's schedule
    x0 = torch.randn(64, 12, 16, 16, generator=generator())

    def loss(error):
        oracle = Oracle(x0, alphas_cumprod, error)
        return float(dit.eps_loss(oracle, None, None, x0, alphas_cumprod, generator(1))), oracle.t

    right, t = loss(0.0)
    assert right < 1e-5
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    weight = (1 / alphas_cumprod[t]).clamp(max=dit.LARGEST_WEIGHT) * ((1 + dit.GAMMA) / (1 + snr)).clamp(max=1)
    assert loss(0.5)[0] == pytest.approx(0.25 * float(weight.mean()), rel=1e-3)


def test_timesteps_cover_the_schedule_and_half_are_in_its_first_third():
    t = dit.timesteps(100_000, 1000, generator())
    assert t.min() == 0
    assert t.max() == 999
    assert float((t < 354).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_bfloat16_is_used_only_where_the_processor_has_it(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda fast=fast: fast)
        assert kinds.product_dtype(torch.device("cpu")) == dtype
        with kinds.fast_products(torch.device("cpu")):
            assert (torch.ones(8, 8) @ torch.ones(8, 8)).dtype == dtype


# --- judge


def test_the_judge_learns_half_of_each_of_two_things():
    target = judge_training.target_of(torch.tensor([[3, -1], [3, 7]]))
    assert target.sum(1).tolist() == [1, 1]
    assert target[0, 3] == 1
    assert target[1, [3, 7]].tolist() == [0.5, 0.5]


def test_both_things_must_be_named():
    classifier = judge.Classifier(NAMES).eval()
    logits = torch.zeros(3, len(NAMES))
    logits[0, [1, 2]] = torch.tensor([2.0, 3.0])
    logits[1, [1, 5]] = torch.tensor([2.0, 3.0])
    logits[2, [4, 1]] = torch.tensor([2.0, 3.0])
    classifier.logits = lambda images: logits
    expected = [(NAMES[1], NAMES[2]), (NAMES[1], NAMES[2]), (NAMES[4], NAMES[1])]
    assert classifier.top2(torch.zeros(3, 3, 64, 64), expected) == pytest.approx(2 / 3)


# --- the whole recipe


def test_an_unknown_teacher_is_named():
    with raises_naming("mlp", "unet", "dit"):
        ZooConfig(model="mlp")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Settings of a training of seconds, with a tiny transformer and few evaluation prompts."""
    plain = dit.build_transformer
    monkeypatch.setattr(dit, "build_transformer", lambda: plain(layers=1, heads=2, width=16))
    monkeypatch.setattr(dit.DiTTeacher, "labels", lambda self, count, draw: scenes.random_labels(count or 16, draw))
    monkeypatch.setattr(dit.DiTTeacher, "fixed_prompts", lambda self: ["pizza", "panda and lemon", "fox"])
    monkeypatch.setattr(dit.DiTTeacher, "steps", 2)
    icons = [(icon, style) for icon in (*CANDIDATES.values(), *OTHERS) for style in STYLES]
    pixels = torch.randint(256, (len(icons), 4, SIDE, SIDE), generator=generator(), dtype=torch.uint8)
    (tmp_path / "out").mkdir()
    save_sprites(tmp_path / "out" / "sprites.safetensors", Sprites(pixels, *map(list, zip(*icons, strict=True))))
    return {
        "model": "dit", "out": str(tmp_path / "out"), "pool": 64, "first_fill": 1, "batch_teacher": 4,
        "minutes_teacher": 0.01, "steps_classifier": 2,
    }  # fmt: skip


def test_a_signal_saves_the_training_and_the_same_command_continues_it(small, monkeypatch, tmp_path):
    plain, steps = dit.eps_loss, []

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(dit, "eps_loss", stopping)
    config = ZooConfig(**small | {"minutes_teacher": 60, "stage": "teacher"})
    with pytest.raises(Interrupted):
        stages.train(config)
    _, note = teacher.load_trained(stages.autoencoder(config), tmp_path / "out", dit.DiTTeacher())
    assert note["step"] == 2
    steps[:] = [1, 1, 1]  # no signal any more
    elapsed = note["elapsed"] / 60
    stages.train(ZooConfig(**small | {"minutes_teacher": elapsed + 0.01, "stage": "teacher"}))
    assert teacher.load_trained(stages.autoencoder(config), tmp_path / "out", dit.DiTTeacher())[1]["step"] > 2


@pytest.mark.slow
def test_every_stage_of_the_dit_from_sprites_to_card(small, monkeypatch, tmp_path):
    import functools

    from wadi.zoo.recipe import export

    monkeypatch.setattr(export, "eval_prompts", lambda: [("pizza", "pizza", 0)])
    monkeypatch.setattr(export, "eval_pair_prompts", lambda: eval_pair_prompts()[:2])
    for name in ("accuracy_on_data", "pair_accuracy_on_data"):
        monkeypatch.setattr(judge_training, name, functools.partial(getattr(judge_training, name), count=32))
    monkeypatch.setattr(judge_training, "POOL", 64)
    for stage in ("teacher", "classifier", "export"):
        weights = stages.train(ZooConfig(**small | {"stage": stage}))
    assert weights == tmp_path / "out" / "weights-dit"
    quality = json.loads((weights / "quality.json").read_text())
    assert {"teacher_pairs", "teacher_one_step", "classifier_pairs"} <= quality.keys()
    assert f"{quality['teacher_pairs']:.4f}" in (weights / "README.md").read_text()
    pipe = load_pipeline(weights / "teacher")
    assert type(pipe).__name__ == "PixArtAlphaPipeline"
    image = pipe("panda and lemon", num_inference_steps=2, use_resolution_binning=False, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
