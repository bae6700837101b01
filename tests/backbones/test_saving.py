"""Every export loads with the printed line of Python: for every family and dtype, without this package."""

import json
import shutil

import pytest
import small_pipelines
import torch
from PIL import Image
from safetensors.torch import save_file

from raising import raises_naming
from wadi import roles
from wadi.backbones import check_not_distilled, from_pipeline, load_pipeline
from wadi.cli.main import main
from wadi.lorad import LoRaDConfig

DTYPES = ("float32", "bfloat16", "float16")
NETWORKS = ("unet", "transformer")
# Their pipelines draw the later noise from torch's global generator.
GLOBAL_NOISE = ("sd3", "flux", "z-image", "lumina2", "chroma", "qwen-image", "flux2", "flux2-klein")
FLOWS = (*GLOBAL_NOISE, "sana")


@pytest.fixture(scope="session")
def adapter_of(folder_of, tmp_path_factory):
    """``adapter_of(family)``: an adapter of a family's small pipeline, at a small resolution."""
    folders = {}

    def adapter(name):
        if name not in folders:
            backbone = from_pipeline(load_pipeline(folder_of(name)), small_pipelines.RESOLUTIONS.get(name))
            roles.attach(backbone.network, "student", LoRaDConfig(r=2, target_modules=backbone.student_targets))
            folders[name] = tmp_path_factory.mktemp(name) / "adapter"
            extra = {"timestep": 800, "teacher": str(folder_of(name)), "resolution": list(backbone.resolution)}
            roles.save(backbone.network, "student", folders[name], extra=extra)
        return folders[name]

    return adapter


def executed(printed, out):
    """The pipeline that the printed line loads, after its call."""
    from diffusers import DiffusionPipeline

    (line,) = [line for line in printed.splitlines() if line.startswith(f"{out}: ")]
    loading, call = line.removeprefix(f"{out}: ").split(")(")
    names = {"torch": torch, "DiffusionPipeline": DiffusionPipeline, "prompt": "red apple"}
    exec(f"pipe = {loading})\npipe.set_progress_bar_config(disable=True)\nimage = pipe({call}.images[0]", names)
    assert names["image"].size[0] > 0
    return names["pipe"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", small_pipelines.MAKERS)
def test_the_line_of_an_export_can_be_executed(adapter_of, tmp_path, capsys, family, dtype):
    out = tmp_path / "out"
    argv = ["export", "--adapter", str(adapter_of(family)), "--out", str(out), "--dtype", dtype]
    capsys.readouterr()
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "Writing model shards" not in printed.err
    pipeline = executed(printed.out, out)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {part.dtype for part in models.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("family", small_pipelines.MAKERS)
def test_an_export_of_four_steps_makes_the_bytes_of_wadi_generate(adapter_of, tmp_path, family):
    from diffusers import DiffusionPipeline

    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(adapter_of(family), adapter)
    about = json.loads((adapter / "wadi.json").read_text())
    del about["timestep"]
    about["timesteps"] = [1000, 750, 500, 250] if family in FLOWS else [799, 599, 399, 199]
    (adapter / "wadi.json").write_text(json.dumps(about))
    assert main(["export", "--adapter", str(adapter), "--out", str(out), "--device", "cpu"]) == 0
    plain = DiffusionPipeline.from_pretrained(out)
    plain.set_progress_bar_config(disable=True)
    for component in ("unet", "transformer"):
        if hasattr(plain, component):
            calls = record_timesteps(getattr(plain, component))
    backbone, generator = from_pipeline(load_pipeline(out)), torch.Generator().manual_seed(5)
    assert backbone.student_timesteps == tuple(about["timesteps"])
    if family in GLOBAL_NOISE:  # give it this state
        own = torch.Generator().manual_seed(5)
        torch.randn((1, *backbone.latent_shape), generator=own)
        torch.set_rng_state(own.get_state())
    exported = plain(prompt="red apple", num_inference_steps=4, generator=generator, **backbone.call).images[0]
    assert len(calls) == 4
    for option, source in (("--adapter", adapter), ("--run", out)):
        file = tmp_path / f"{source.name}.png"
        argv = ["generate", "red apple", option, str(source), "--seed", "5", "--out", str(file), "--device", "cpu"]
        assert main(argv) == 0
        assert Image.open(file).tobytes() == exported.tobytes()
    with raises_naming(type(plain.scheduler).__name__):
        check_not_distilled(plain, backbone.network)


def record_timesteps(network):
    """A list that gets an entry for each evaluation of the network."""
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_load_has_one_dtype(adapter_of, tmp_path, dtype):
    from diffusers import DiffusionPipeline

    assert main(["export", "--adapter", str(adapter_of("sd1")), "--out", str(tmp_path / "out"), "--dtype", dtype]) == 0
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert {plain.unet.dtype, plain.text_encoder.dtype, plain.vae.dtype} == {torch.float32}
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())["model_type"] == "clip_text_model"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lines_of_a_hybrid_and_of_authors_weights_can_be_executed(folder_of, adapter_of, tmp_path, capsys, dtype):
    teacher, out = folder_of("sd1"), tmp_path / "out"
    argv = ["swap", str(teacher), str(adapter_of("sd1")), "--take", "norm", "--out", str(out), "--dtype", dtype]
    assert main(argv) == 0
    assert executed(capsys.readouterr().out, out).unet.dtype == getattr(torch, dtype)
    file, authors = tmp_path / "rotated_unet.safetensors", tmp_path / "authors"
    save_file(load_pipeline(teacher).unet.state_dict(), file)
    assert main(["import-authors", str(file), "--base", str(teacher), "--out", str(authors), "--dtype", dtype]) == 0
    assert executed(capsys.readouterr().out, authors).unet.dtype == getattr(torch, dtype)


def test_authors_weights_that_are_not_finite_are_errors(folder_of, tmp_path, capsys):
    teacher, file = folder_of("sd1"), tmp_path / "rotated_unet.safetensors"
    state = {name: value.clone() for name, value in load_pipeline(teacher).unet.state_dict().items()}
    state["conv_in.bias"][0] = float("inf")
    save_file(state, file)
    assert main(["import-authors", str(file), "--base", str(teacher), "--out", str(tmp_path / "out")]) == 2
    assert "conv_in.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
