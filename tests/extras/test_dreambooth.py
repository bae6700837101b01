"""DreamBooth: the subject is learned, the class is kept, the same seed repeats it, and the files are standard ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from raising import raises_naming
from wadi import roles
from wadi.backbones import from_pipeline, load_pipeline
from wadi.diffusion.schedulers import timestep_of
from wadi.extras.balanced import balanced_indices
from wadi.extras.dreambooth.config import DreamboothConfig
from wadi.extras.dreambooth.losses import dreambooth_loss, pair_nearest
from wadi.extras.dreambooth.prior import generate_prior
from wadi.extras.dreambooth.saving import save_subject
from wadi.extras.dreambooth.subject import read_subject
from wadi.extras.dreambooth.training import train_subject
from wadi.extras.lora.apply import apply_lora
from wadi.io.image_folders import image_paths
from wadi.pipelines.load import load

TARGETS = r"(down_blocks|mid_block|up_blocks)\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.2|conv1|conv2)"
METHODS = ("lorad", "lora", "full")


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    """Two images, one of them transparent and of another shape, and a text file."""
    folder = tmp_path_factory.mktemp("subject")
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 4:12] = (250, 40, 40)
    Image.fromarray(pixels).save(folder / "1.png")
    clear = np.zeros((20, 40, 4), np.uint8)
    clear[:, 15:25] = (40, 250, 40, 255)
    Image.fromarray(clear, "RGBA").save(folder / "2.PNG")
    (folder / "README.md").write_text("whose they are")
    return folder


@pytest.fixture(scope="module")
def one_step_folder(sd_v_folder, tmp_path_factory):
    """An exported one-step pipeline, asked at timestep 700."""
    from wadi.diffusion.schedulers import one_step_scheduler
    from wadi.lorad import LoRaDConfig

    pipeline = load_pipeline(sd_v_folder)
    backbone = from_pipeline(pipeline)
    roles.attach(backbone.network, "student", LoRaDConfig(r=2, target_modules=TARGETS))
    roles.fuse(backbone.network, "student")
    pipeline.scheduler = one_step_scheduler(pipeline.scheduler, 700)
    folder = tmp_path_factory.mktemp("one-step") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


def settings(method="lorad", **changes):
    values = {"method": method, "rank": 4, "target_modules": TARGETS, "lr": 1e-2, "steps": 12, "batch": 2, "seed": 3}
    return DreamboothConfig(**{**values, **changes})


def prepared(folder, subject_folder):
    """``(pipeline, backbone, latents, condition)`` of the subject's images and prompt."""
    pipeline = load_pipeline(folder)
    backbone = from_pipeline(pipeline)
    images, _ = read_subject(subject_folder, backbone.resolution)
    return pipeline, backbone, backbone.encode_images(images), backbone.encode(["sks apple"])


def prior_of(backbone, steps=0):
    return generate_prior(backbone, ["red apple", "blue car"], 4, 0, steps, 2.0, batch=3)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


# --- images and prior ------------------------------------------------------------------------------------------------------


def test_images_are_cropped_and_transparency_is_white(subject_folder):
    tensor, images = read_subject(subject_folder, (16, 16))
    assert tensor.shape == (2, 3, 16, 16)
    assert [image.size for image in images] == [(16, 16)] * 2
    assert tensor[0, :, 8, 8].tolist() == pytest.approx([250 / 255, 40 / 255, 40 / 255], abs=1e-6)
    assert tensor[1, :, 8, 0].tolist() == [1, 1, 1]
    assert tensor[1, 1, 8, 8] > 0.9 > 0.3 > tensor[1, 0, 8, 8]  # its middle, green


def test_the_prior_is_what_the_pipeline_generates(one_step_folder):
    """Each image depends on its own seed and prompt, not on the others of the batch."""
    backbone = from_pipeline(load_pipeline(one_step_folder))
    prior = prior_of(backbone)
    assert timestep_of(backbone.pipeline.scheduler) == 700
    pipeline = load(one_step_folder)
    for i, prompt in enumerate(["red apple", "blue car", "red apple", "blue car"]):
        latents = pipeline(
            prompt, generator=torch.Generator().manual_seed(i), num_inference_steps=1, guidance_scale=0.0, output_type="latent"
        ).images
        torch.testing.assert_close(prior.x0[i : i + 1], latents, rtol=1e-4, atol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------------


def test_pairs_use_every_image_once_and_the_nearest_first():
    images = torch.tensor([[0.0], [10.0], [20.0]])
    generated = torch.tensor([[19.0], [9.0], [11.5]])
    assert pair_nearest(generated, images).tolist() == [2, 1, 0]
    assert sorted(pair_nearest(torch.randn(6, 4), torch.randn(6, 4)).tolist()) == list(range(6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["diffusion", "one-step"])
def test_training_learns_the_subject_and_keeps_the_class(request, subject_folder, method, loss):
    folder = request.getfixturevalue("one_step_folder" if loss == "one-step" else "sd_v_folder")
    _, backbone, latents, condition = prepared(folder, subject_folder)
    prior = prior_of(backbone, steps=0 if loss == "one-step" else 2)
    lr = {"lorad": 5e-2, "lora": 2e-2, "full": 3e-3}[method]
    config = settings(method, loss=loss, steps=40, lr=lr)
    trained = train_subject(backbone, latents, condition, prior, config, quiet=True)
    assert np.mean(trained.losses[-8:]) < 0.8 * np.mean(trained.losses[:8])
    if loss == "one-step":  # with a prior the images of the class change less than without
        with_prior = _drift(backbone, prior)
        _, alone, latents, condition = prepared(folder, subject_folder)
        train_subject(alone, latents, condition, None, config, quiet=True)
        assert with_prior < 0.7 * _drift(alone, prior)


@torch.no_grad()
def _drift(backbone, prior):
    """Return the mean squared change of the prior's latents."""
    from wadi.sampling import one_step

    generated = one_step(backbone, prior.condition, prior.z, timestep_of(backbone.pipeline.scheduler))
    return float((generated - prior.x0).square().mean())


def test_the_losses_are_those_of_the_docstring_at_the_students_own_timestep(one_step_folder, subject_folder):
    """The subject's part, and ``prior_weight`` times the class's, each written again from what the student generates."""
    _, backbone, latents, condition = prepared(one_step_folder, subject_folder)
    prior = prior_of(backbone)
    config = settings(loss="one-step", prior_weight=0.25)
    with torch.no_grad():
        for parameter in backbone.network.parameters():
            parameter.mul_(1.3)  # so that the class's images are no longer those of the prior
        loss, of_subject = dreambooth_loss(backbone, latents, condition, prior, config, torch.Generator().manual_seed(4))
        generator = torch.Generator().manual_seed(4)
        rows = torch.randperm(2, generator=generator)
        z = torch.randn((2, *latents.shape[1:]), generator=generator)
        chosen = torch.randint(4, (2,), generator=generator)

        def generated(noise, condition):
            t = torch.full((2,), 700)
            return backbone.process.x0(backbone.predict(noise, t, condition), noise, t)

        images, wanted = generated(z, condition.expand(2)), latents[rows]
        apart = torch.cdist(images.flatten(1), wanted.flatten(1))
        nearest_are_parallel = int(apart.argmin()) in (0, 3)
        subject = float((images - (wanted if nearest_are_parallel else wanted.flip(0))).square().mean())
        kept = (generated(prior.z[chosen], prior.condition[chosen]) - prior.x0[chosen]).square().mean()
    assert float(of_subject) == pytest.approx(subject, rel=1e-4)
    assert float(loss) == pytest.approx(subject + 0.25 * float(kept), rel=1e-4)
    assert float(kept) > 0.01 * subject


def test_every_image_is_used_equally_often():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        assert balanced_indices(4, 8, generator).bincount().tolist() == [2, 2, 2, 2]
        assert balanced_indices(4, 3, generator).bincount().max() == 1


def test_the_learning_rate_falls_along_a_cosine_to_a_tenth(sd_v_folder, subject_folder, monkeypatch):
    _, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
    rates, plain = [], torch.optim.AdamW.step

    def step(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train_subject(backbone, latents, condition, None, settings(steps=5, lr=0.02), quiet=True)
    assert rates == pytest.approx([0.02 * (0.55 + 0.45 * np.cos(np.pi * i / 5)) for i in range(5)])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_weights_bit_for_bit(sd_v_folder, subject_folder, method):
    states = []
    for _ in range(2):
        torch.rand(7)  # the global generator must not matter
        _, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
        train_subject(backbone, latents, condition, prior_of(backbone, 2), settings(method, steps=4), quiet=True)
        states.append(weights(backbone.network))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    _, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
    train_subject(backbone, latents, condition, prior_of(backbone, 2), settings(method, steps=4, seed=4), quiet=True)
    assert any(not torch.equal(tensor, states[0][name]) for name, tensor in weights(backbone.network).items())


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_is_trained_and_saved_weights_predict_the_same(sd_v_folder, subject_folder, method, tmp_path):
    """Saved, loaded into a fresh pipeline and fused, the adapter gives the trained network's prediction."""
    pipeline, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
    plain = weights(backbone.network)
    config = settings(method)
    trained = train_subject(backbone, latents, condition, None, config, quiet=True)
    base = {name.replace(".base_layer", ""): tensor for name, tensor in weights(backbone.network).items()}
    changed = [name for name in plain if not torch.equal(plain[name], base[name])]
    assert bool(changed) == (method == "full")
    assert trained.parameters == sum(p.numel() for p in backbone.network.parameters() if p.requires_grad)
    x_t, t = torch.randn(1, *backbone.latent_shape), torch.tensor([500])
    with torch.no_grad():
        expected = backbone.predict(x_t, t, condition)
    save_subject(pipeline, backbone, config.method, tmp_path / "out", {"dreambooth": {}})
    again = load_pipeline(tmp_path / "out" if method == "full" else sd_v_folder)
    if method != "full":
        apply_lora(again, tmp_path / "out")
    with torch.no_grad():
        prediction = from_pipeline(again).predict(x_t, t, condition)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "out" / "wadi.json").read_text()) == {"dreambooth": {}}


def test_diffusers_reads_the_lora_and_peft_the_angles(sd_v_folder, subject_folder, tmp_path):
    for method in ("lora", "lorad"):
        pipeline, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
        train_subject(backbone, latents, condition, None, settings(method), quiet=True)
        x_t, t = torch.randn(1, *backbone.latent_shape), torch.tensor([500])
        with torch.no_grad():
            expected = backbone.predict(x_t, t, condition)
        save_subject(pipeline, backbone, method, tmp_path / method, {})
        plain = load_pipeline(sd_v_folder)
        if method == "lora":
            plain.load_lora_weights(tmp_path / method)
        else:
            from peft import PeftModel

            plain.unet = PeftModel.from_pretrained(plain.unet, tmp_path / method)
        with torch.no_grad():
            embeds = condition.tensors["prompt_embeds"]
            prediction = plain.unet(x_t, t, encoder_hidden_states=embeds, return_dict=False)[0]
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "dora"}, "'dora'"),
        ({"loss": "vsd"}, "'vsd'"),
        ({"rank": 0}, "rank"),
        ({"steps": 0}, "steps"),
        ({"batch": -1}, "-1"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "nan"),
        ({"prior_weight": -1.0}, "prior_weight"),
    ],
)
def test_settings_out_of_range_are_named(changes, named):
    with raises_naming(named):
        settings(**changes)


def test_folders_without_images_and_files_that_are_not_images(tmp_path):
    with raises_naming("none"):
        read_subject(tmp_path / "none", (16, 16))
    (tmp_path / "notes.txt").write_text("not an image")
    with raises_naming(tmp_path):
        read_subject(tmp_path, (16, 16))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    for name, data in (
        ("IMG_1.HEIC", b"\0\0\0\x18ftypheic"),
        ("broken.png", (tmp_path / "whole.png").read_bytes()[:60]),
        ("text.jpg", b"hello"),
        ("empty.webp", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with raises_naming(name):
            read_subject(tmp_path, (16, 16))
        (tmp_path / name).unlink()
    assert len(image_paths(tmp_path, "The folder")) == 1


def test_targets_that_match_nothing_and_gradients_that_are_not_finite(sd_v_folder, subject_folder):
    for method in ("lorad", "lora"):
        _, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
        with raises_naming("'nothing'"):
            train_subject(backbone, latents, condition, None, settings(method, target_modules="nothing"), quiet=True)
    _, backbone, latents, condition = prepared(sd_v_folder, subject_folder)
    with raises_naming("step 0"):
        train_subject(backbone, latents * float("inf"), condition, None, settings(), quiet=True)
