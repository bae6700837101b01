"""Every component of a pipeline is complete and finite, or the load stops and names what is wrong."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from wadi.backbones import load_pipeline
from wadi.backbones.configs import build_network
from wadi.errors import WadiError

NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
MODELS = [
    ("sd1", "unet"), ("sd1", "vae"), ("sd1", "text_encoder"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder_3"),
    ("flux", "transformer"), ("sana", "text_encoder"), ("sana", "vae"),
]  # fmt: skip


@pytest.fixture
def copied(folder_of, tmp_path):
    """``copied(family)``: a copy of a small pipeline's folder that a test may damage."""

    def copy(family="sd1"):
        shutil.copytree(folder_of(family), tmp_path / family)
        return tmp_path / family

    return copy


def weights(folder, component):
    library = json.loads((folder / "model_index.json").read_text())[component][0]
    return folder / component / NAMES[library]


def changed(file, change):
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def with_value(tensors, name, value):
    tensors[name].view(-1)[-1] = value
    return tensors


def set_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("family", "component"), MODELS)
def test_a_model_that_lacks_tensors_is_refused_and_they_are_named(copied, family, component):
    folder = copied(family)
    removed = sorted(load_file(weights(folder, component)))[:17]
    changed(weights(folder, component), lambda tensors: {k: v for k, v in tensors.items() if k not in removed})
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder)
    assert component in str(refused.value)
    assert "17 tensors" in str(refused.value)
    assert removed[0].removeprefix("text_model.").removeprefix("model.") in str(refused.value)


@pytest.mark.parametrize(("family", "component"), MODELS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_with_a_value_that_is_not_finite_is_refused_and_the_tensor_named(copied, family, component, value):
    folder = copied(family)
    name = sorted(k for k, v in load_file(weights(folder, component)).items() if v.is_floating_point())[-1]
    changed(weights(folder, component), lambda tensors: with_value(tensors, name, value))
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder)
    assert component in str(refused.value)
    assert name.removeprefix("text_model.") in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_value_beyond_the_range_of_the_dtype_is_named(copied, dtype):
    """Float16 holds at most 65504: a larger weight becomes infinite while it is loaded."""
    folder = copied()
    changed(weights(folder, "vae"), lambda tensors: with_value(tensors, "decoder.conv_in.bias", 1e6))
    if dtype is torch.bfloat16:
        load_pipeline(folder, dtype)
        return
    with pytest.raises(WadiError, match=r"decoder\.conv_in\.bias"):
        load_pipeline(folder, dtype)


@pytest.mark.parametrize(
    ("family", "component"), [("sd1", "tokenizer"), ("sdxl", "tokenizer_2"), ("sd3", "tokenizer_3"), ("sana", "tokenizer")]
)
def test_a_tokenizer_without_its_files_is_an_error(copied, family, component):
    folder = copied(family)
    for file in (folder / component).iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder)
    assert f"{component}'" in str(refused.value)
    assert "tokenizer.json" in str(refused.value)


def test_half_of_the_files_of_a_slow_tokenizer_do_not_do(copied):
    folder = copied()
    tokenizer = load_pipeline(folder).tokenizer
    (folder / "tokenizer" / "tokenizer.json").unlink()
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    load_pipeline(folder)  # vocab.json and merges.txt, as published
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(WadiError, match=r"merges\.txt"):
        load_pipeline(folder)


def test_a_tokenizer_larger_than_the_embedding_is_an_error(copied):
    folder = copied()
    tokenizer = load_pipeline(folder).tokenizer
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(WadiError, match=rf"{len(tokenizer) - 1}.*{len(tokenizer) - 2}"):
        load_pipeline(folder)


# --- files that are not what they should be ---------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def pickled(file):
    file.write_bytes(pickle.dumps({"weight": [1.0]}))


def piped(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [cut, pickled, piped])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_named(copied, damage, component):
    folder = copied()
    damage(weights(folder, component))
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder)
    assert str(weights(folder, component)) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]
)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(copied, file):
    folder = copied()
    piped(folder / file)
    with pytest.raises(WadiError, match=file):
        load_pipeline(folder)


@pytest.mark.parametrize("name", [["A", "B"], None, 3, {}])
def test_a_class_name_that_is_no_name_is_shown(copied, name):
    folder = copied()
    set_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder)
    assert repr(name) in str(refused.value)
    with pytest.raises(WadiError) as refused:
        build_network({"_class_name": name})
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("place", [["diffusers", "NoSuchModel"], ["transformers", "BertModel"], ["os", "system"]])
def test_a_component_of_another_class_is_an_error(copied, place):
    folder = copied()
    set_json(folder / "model_index.json", text_encoder=place)
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder)
    assert "text_encoder" in str(refused.value) or place[1] in str(refused.value)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("unet/config.json", {"layers_per_block": 10**7}),
        ("unet/config.json", {"sample_size": None}),
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"in_channels": 10**5000}),
        ("vae/config.json", {"latent_channels": None}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("text_encoder/config.json", {"hidden_size": None}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}),
        ("scheduler/scheduler_config.json", {"beta_start": "a"}),
    ],
)
def test_null_and_absurd_settings_are_one_line(copied, file, values):
    from wadi.backbones import from_pipeline

    folder = copied()
    if values.get("in_channels"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"in_channels": 4', '"in_channels": 1' + "0" * 5000))
    else:
        set_json(folder / file, **values)
    with pytest.raises(WadiError) as refused:
        from_pipeline(load_pipeline(folder))
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_is_said_to_be_that_with_what_would_fit(folder_of, monkeypatch, error):
    from wadi.backbones import loading

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loading, "load_complete", fail)
    with pytest.raises(WadiError) as refused:
        load_pipeline(folder_of("sd1"))
    assert "emory" in str(refused.value)
    assert "bfloat16" in str(refused.value)
    assert "damaged" not in str(refused.value)
