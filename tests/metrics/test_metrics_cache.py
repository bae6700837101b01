"""Features are computed once for each image and network, and never taken from another."""

from dataclasses import replace

import pytest
import torch
from metric_toys import pictures

from raising import raises_naming
from wadi.io.versions import installed_versions
from wadi.metrics.cache import FeatureCache, image_key
from wadi.metrics.features import Extractor


class Counting:
    def __init__(self):
        self.seen = 0

    def __call__(self, x):
        self.seen += len(x)
        return x.mean((2, 3))


@pytest.fixture
def extractor():
    return Extractor("mean colour", "0" * 64, 4, 3, "clean", Counting())


def test_an_image_is_computed_once(extractor, tmp_path):
    images = pictures(6, 8, 8)
    with FeatureCache(extractor, tmp_path) as cache:
        first = cache(images[:4])
    assert torch.equal(first, replace(extractor, network=lambda x: x.mean((2, 3)))(images[:4]))
    again = FeatureCache(extractor, tmp_path)
    assert torch.equal(again(images.flip(0)), torch.cat([extractor(images[4:]).flip(0), first.flip(0)]))
    assert (again.hits, again.misses) == (4, 2)
    assert extractor.network.seen == 4 + 2 + 2  # one pair by the line above itself


def test_an_image_twice_in_a_batch_is_computed_once(extractor, tmp_path):
    image = pictures(1, 8, 8)
    found = FeatureCache(extractor, tmp_path)(torch.cat([image, image]))
    assert extractor.network.seen == 1
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("change", [{"digest": "1" * 64}, {"resize": "legacy-tf"}, {"size": 5}, {"name": "other"}])
def test_another_network_or_filter_has_a_cache_of_its_own(extractor, tmp_path, change):
    images = pictures(2, 8, 8)
    with FeatureCache(extractor, tmp_path) as cache:
        cache(images)
    with FeatureCache(replace(extractor, **change), tmp_path) as other:
        other(images)
    assert other.misses == 2


@pytest.mark.parametrize("name", ["torch", "pillow", "transformers"])
def test_another_version_of_a_library_has_a_cache_of_its_own(extractor, tmp_path, monkeypatch, name):
    with FeatureCache(extractor, tmp_path) as cache:
        cache(pictures(2, 8, 8))
    found = installed_versions([name])
    monkeypatch.setattr("wadi.metrics.cache.installed_versions", lambda names: {**dict.fromkeys(names), **found, name: "9.9"})
    assert FeatureCache(extractor, tmp_path).folder != cache.folder


def test_another_kind_of_device_has_a_cache_of_its_own(extractor, tmp_path):
    folders = {FeatureCache(replace(extractor, device=device), tmp_path).folder for device in ("cpu", "cuda", "cuda:1")}
    assert len(folders) == 2


def test_bytes_of_another_shape_are_another_image():
    flat = torch.zeros(3, 2, 8, dtype=torch.uint8)
    assert image_key(flat) != image_key(flat.reshape(3, 4, 4))
    assert image_key(flat) == image_key(flat.clone())


def test_a_full_shard_is_kept_though_the_process_dies(extractor, tmp_path):
    images = pictures(5, 8, 8)
    lost = FeatureCache(extractor, tmp_path, shard=2)
    for image in images.split(1):
        lost(image)
    again = FeatureCache(extractor, tmp_path)
    again(images)
    assert (again.hits, again.misses) == (4, 1)


def test_two_writers_do_not_disturb_each_other(extractor, tmp_path):
    images = pictures(4, 8, 8)
    one, two = FeatureCache(extractor, tmp_path), FeatureCache(extractor, tmp_path)
    one(images[:3])
    two(images[2:])
    one.flush()
    two.flush()
    both = FeatureCache(extractor, tmp_path)
    assert torch.equal(both(images), extractor(images))
    assert both.misses == 0


def test_mixed_sizes_and_no_images(extractor, tmp_path):
    cache = FeatureCache(extractor, tmp_path)
    mixed = [pictures(1, 8, 8)[0], pictures(1, 20, 5)[0]]
    assert torch.equal(cache(mixed), extractor(mixed))
    assert cache([]).shape == (0, 3)


def test_a_damaged_shard_is_named(extractor, tmp_path):
    with FeatureCache(extractor, tmp_path) as cache:
        cache(pictures(3, 8, 8))
    shard = next(cache.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with raises_naming(shard.name):
        FeatureCache(extractor, tmp_path)


def test_a_full_disk_leaves_the_cache_as_it_was(extractor, tmp_path, full_disk):
    with FeatureCache(extractor, tmp_path) as cache:
        cache(pictures(3, 8, 8))
    fuller = FeatureCache(extractor, tmp_path)
    fuller(pictures(20, 8, 8, seed=1))
    with full_disk(100), raises_naming(cache.folder.name):
        fuller.flush()
    again = FeatureCache(extractor, tmp_path)
    again(pictures(3, 8, 8))
    assert again.misses == 0


def test_the_cache_is_in_the_users_folder(extractor, tmp_path, monkeypatch):
    monkeypatch.setenv("WADI_CACHE", str(tmp_path / "mine"))
    with FeatureCache(extractor) as cache:
        cache(pictures(1, 8, 8))
    assert cache.folder.parent == tmp_path / "mine" / "features"
    monkeypatch.delenv("WADI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert FeatureCache(extractor).folder.is_relative_to(tmp_path / "xdg" / "wadi")
