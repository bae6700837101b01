"""Every command reads the copy of the weights that diffusers loads."""

import json
import shutil
from types import SimpleNamespace

import pytest
import small_pipelines
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from wadi.analysis.sources import open_teacher
from wadi.backbones import load_pipeline
from wadi.backbones.configs import pipeline_index
from wadi.backbones.digest import teacher_digest
from wadi.backbones.hub import pipeline_folder
from wadi.backbones.lazy_tensors import network_weights
from wadi.backbones.weight_files import component_weights, pipeline_weights
from wadi.cli.main import main
from wadi.errors import WadiError
from wadi.evaluate.generators import find
from wadi.extras.control.pipeline import load_control
from wadi.zoo.paths import absolute_source

SHARDS = "40KB"  # a small network has several


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Two small pipelines with different weights."""
    folder = tmp_path_factory.mktemp("stored")
    one, other = (small_pipelines.make("sd1", folder / name) for name in ("one", "other"))
    with torch.no_grad():
        for model in (other.unet, other.vae, other.text_encoder):
            for parameter in model.parameters():
                parameter.add_(0.25)
    return one, other


def same(tensors, network, dtype=torch.float32):
    state = network.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name].to(dtype), value.to(dtype)) for name, value in state.items())


def test_fp16_shards_beside_full_ones(pipelines, tmp_path):
    full, half = pipelines
    full.save_pretrained(tmp_path / "p", max_shard_size=SHARDS)
    half.save_pretrained(tmp_path / "p", variant="fp16", max_shard_size=SHARDS)
    assert len(list((tmp_path / "p" / "unet").glob("*fp16-*.safetensors"))) > 1
    for loaded, expected in ((tmp_path / "p", full), (f"{tmp_path / 'p'}?variant=fp16", half)):
        same(load_pipeline(loaded).unet.state_dict(), expected.unet)
        same(network_weights(loaded), expected.unet)
        same(load_pipeline(loaded).text_encoder.state_dict(), expected.text_encoder)
    same(open_teacher(str(tmp_path / "p")), full.unet)


def test_a_stale_single_file_beside_shards(pipelines, tmp_path):
    """diffusers reads the shards, transformers the single file."""
    now, stale = pipelines
    stale.save_pretrained(tmp_path / "p")
    now.save_pretrained(tmp_path / "new", max_shard_size=SHARDS)
    for component in ("unet", "text_encoder"):
        for file in (tmp_path / "new" / component).iterdir():
            shutil.copyfile(file, tmp_path / "p" / component / file.name)
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(tmp_path / "p")
    loaded = load_pipeline(tmp_path / "p")
    same(loaded.unet.state_dict(), plain.unet)
    same(loaded.text_encoder.state_dict(), plain.text_encoder)
    same(network_weights(tmp_path / "p"), now.unet)
    found = pipeline_weights(tmp_path / "p", pipeline_index(tmp_path / "p"))
    assert [file.name for file in found["text_encoder"].files] == ["model.safetensors"]
    assert len(found["unet"].files) > 1


def test_extract_and_swap_and_analyze_read_what_is_loaded(pipelines, tmp_path):
    """A student that is the teacher, beside stale files of something else: no layer changed."""
    now, stale = pipelines
    now.save_pretrained(tmp_path / "teacher")
    stale.save_pretrained(tmp_path / "student")
    now.save_pretrained(tmp_path / "new", max_shard_size=SHARDS)
    for file in (tmp_path / "new" / "unet").iterdir():
        shutil.copyfile(file, tmp_path / "student" / "unet" / file.name)
    student = str(tmp_path / "student")
    argv = [str(tmp_path / "teacher"), student, "--out"]
    assert main(["extract", *argv, str(tmp_path / "adapter"), "--rank", "2"]) == 0
    assert all(layer["change"] == 0 for layer in json.loads((tmp_path / "adapter" / "extraction.json").read_text())["layers"])
    assert main(["analyze", *argv, str(tmp_path / "analysis")]) == 0
    summary = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["summary"]
    assert summary["norm_mean"] == 0
    assert main(["swap", *argv, str(tmp_path / "hybrid"), "--take", "norm"]) == 0
    torch.testing.assert_close(
        load_pipeline(tmp_path / "hybrid").unet.conv_in.weight, now.unet.conv_in.weight, rtol=1e-6, atol=1e-7
    )


@pytest.fixture
def half_only(pipelines, tmp_path):
    """A folder of fp16 files alone, as many people have them."""
    pipeline = pipelines[0]
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    for file in (tmp_path / "half").rglob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    return tmp_path / "half"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_of_fp16_files_alone_is_a_teacher(half_only, pipelines, dtype):
    loaded = load_pipeline(half_only, dtype)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {dtype}
    same(loaded.unet.state_dict(), pipelines[0].unet, torch.float16)
    assert teacher_digest(half_only) == teacher_digest(f"{half_only}?variant=fp16")


def test_a_missing_variant_is_an_error_that_names_the_variants(half_only):
    with pytest.raises(WadiError, match=r"fp16.*bf16"):
        load_pipeline(f"{half_only}?variant=bf16")
    for file in list(half_only.rglob("*.fp16.safetensors")):
        shutil.copyfile(file, file.with_name(file.name.replace("fp16", "bf16")))
    with pytest.raises(WadiError, match=r"bf16, fp16"):
        load_pipeline(half_only)
    assert load_pipeline(f"{half_only}?variant=bf16").unet.dtype == torch.float32


def test_a_variant_is_evaluated_and_analysed(half_only, pipelines):
    found = find(f"{half_only}?variant=fp16")
    assert found is not None
    assert found.pipeline
    same(open_teacher(f"{half_only}?variant=fp16"), pipelines[0].unet, torch.float16)


def test_the_variant_stays_with_the_name_of_a_folder(half_only, monkeypatch):
    monkeypatch.chdir(half_only.parent)
    assert absolute_source("half?variant=fp16") == f"{half_only}?variant=fp16"


def test_a_control_of_fp16_files_alone(pipelines, tmp_path):
    from diffusers import ControlNetModel

    ControlNetModel.from_unet(pipelines[0].unet).save_pretrained(tmp_path / "control", variant="fp16")
    assert not (tmp_path / "control" / "diffusion_pytorch_model.safetensors").exists()
    assert type(load_control(tmp_path / "control")).__name__ == "ControlNetModel"


def test_the_hub_cache_gives_what_it_has(half_only, tmp_path, monkeypatch):
    """Offline, a repository of which only the fp16 files were downloaded."""
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(half_only, snapshot)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    import diffusers.pipelines.pipeline_utils as pipelines_of_diffusers

    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    plain = pipelines_of_diffusers.DiffusionPipeline.load_config
    monkeypatch.setattr(
        pipelines_of_diffusers.DiffusionPipeline, "load_config", classmethod(lambda cls, p, **k: plain(p, cache_dir=cache, **k))
    )
    loaded = load_pipeline("owner/name")
    assert loaded.unet.dtype == torch.float32
    assert teacher_digest("owner/name") == teacher_digest(half_only)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Fake a Hub whose only repository is ``owner/name``. Return its folder; downloads are copied to another folder."""
    from diffusers.pipelines import pipeline_utils
    from huggingface_hub import HfApi

    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"

    def names(*_, **__):
        return sorted(file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file())

    def download(path, allow_patterns=("model_index.json",), ignore_patterns=(), **_):
        for name in filter_repo_objects(names(), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, snapshot / name)
        return str(snapshot)

    plain = pipeline_utils.DiffusionPipeline.load_config
    index = classmethod(lambda cls, path, **options: plain(repository if path == "owner/name" else path, **options))
    monkeypatch.setattr(pipeline_utils.DiffusionPipeline, "load_config", index)
    monkeypatch.setattr(HfApi, "list_repo_files", names)
    siblings = lambda *_, **__: SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names()])  # noqa: E731
    monkeypatch.setattr(pipeline_utils, "model_info", siblings)
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "main")
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda *_, **__: f"{download('')}/model_index.json")
    monkeypatch.setattr(pipeline_utils, "snapshot_download", download)
    return repository


def test_a_safety_checker_is_not_downloaded_and_may_be_a_pickle(hub, pipelines):
    pipelines[0].save_pretrained(hub)
    index = json.loads((hub / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (hub / "model_index.json").write_text(json.dumps(index))
    (hub / "safety_checker").mkdir()
    (hub / "safety_checker" / "pytorch_model.bin").write_bytes(b"x")
    same(load_pipeline("owner/name").unet.state_dict(), pipelines[0].unet)
    assert not (pipeline_folder("owner/name") / "safety_checker").exists()


def test_a_variant_outside_the_components_chooses_nothing(hub, pipelines):
    """SDXL's repository has a second autoencoder that is not part of the pipeline."""
    full, half = pipelines
    full.save_pretrained(hub)
    half.save_pretrained(hub, variant="fp16")
    (hub / "vae_old").mkdir()
    shutil.move(hub / "vae" / "diffusion_pytorch_model.fp16.safetensors", hub / "vae_old")
    same(load_pipeline("owner/name").unet.state_dict(), full.unet)


def test_pickled_weights_are_an_error_that_says_how_to_convert_them(pipelines, tmp_path):
    pipelines[0].save_pretrained(tmp_path / "p", safe_serialization=False)
    component = next(p for p in ("unet", "vae") if list((tmp_path / "p" / p).glob("*.bin")))
    with pytest.raises(WadiError, match=rf"{component}.*\.bin.*use_safetensors=False"):
        load_pipeline(tmp_path / "p")


@pytest.mark.parametrize("damage", ["absent", "escaping", "list", "not json"])
def test_a_damaged_index_is_named(pipelines, tmp_path, damage):
    pipelines[0].save_pretrained(tmp_path / "p", max_shard_size=SHARDS)
    index = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    if damage == "absent":
        next((tmp_path / "p" / "unet").glob("*-00002-*")).unlink()
    elif damage == "escaping":
        content["weight_map"] = dict.fromkeys(content["weight_map"], "../../elsewhere.safetensors")
        save_file({"x": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    elif damage == "list":
        content["weight_map"] = [1]
    index.write_text("{" if damage == "not json" else json.dumps(content))
    with pytest.raises(WadiError, match=r"index\.json"):
        component_weights(tmp_path / "p" / "unet")
    with pytest.raises(WadiError, match=r"index\.json"):
        load_pipeline(tmp_path / "p")


@pytest.mark.parametrize("library", ["os", "wadi", "torch.nn"])
def test_a_component_of_a_foreign_library_is_an_error(pipelines, tmp_path, library):
    """A pipeline's own list of classes does not decide what is imported."""
    pipelines[0].save_pretrained(tmp_path / "p")
    path = tmp_path / "p" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": [library, "Module"]}))
    with pytest.raises(WadiError, match=repr(library)):
        load_pipeline(tmp_path / "p")
