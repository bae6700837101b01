"""Load a text-to-image pipeline from a folder or a Hub id, and check that it is complete."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wadi.backbones.base import RESOLUTION, TIMESTEPS
from wadi.backbones.clip_pooling import pool_pipeline_at_end_token
from wadi.backbones.configs import check_config, pipeline_index, read_config
from wadi.backbones.hub import pipeline_folder
from wadi.backbones.load_errors import explain_load_errors, explain_move_errors
from wadi.backbones.registry import family
from wadi.backbones.tokenizer_checks import check_tokenizers, check_vocabulary_files
from wadi.backbones.weight_files import LEFT_OUT, Weights, components, file_names, pipeline_weights, split_variant
from wadi.io.regular import exists
from wadi.io.tensors import open_tensors
from wadi.io.weight_checks import check_stored_floats, load_complete


def load_pipeline(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Any:
    """Return a text-to-image pipeline from a diffusers folder or a Hub id, in ``dtype`` on ``device``, without safety checker.

    It checks that every tensor of the models comes from their files, that every value is finite, and that the tokenizers have
    their vocabularies.

    Args:
        path: folder or Hub id. ``?variant=fp16`` after it chooses a copy of the weights, as ``variant`` does.
        variant: which copy of the weights, such as ``"fp16"``; None = the plain copy, or the only variant.
    Raises:
        WadiError: if ``path`` is not a pipeline folder, or is a Hub id that cannot be reached, is gated or does not exist; if
            no family serves its class, which is checked first; if a model lacks tensors or has values that are not finite; if a
            tokenizer has no vocabulary.
    """
    path, named = split_variant(path)
    variant = variant or named
    index = pipeline_index(path)
    family(index["_class_name"])  # before anything is downloaded or read
    folder = pipeline_folder(path, variant)
    weights = pipeline_weights(folder, index, variant)
    for component in components(index):
        file_names(folder / component)  # raises for anything that is not a regular file
    check_vocabulary_files(index, folder)
    models = {name: _load_model(path, folder, name, index, files, dtype) for name, files in weights.items()}
    without = {name: None for name in LEFT_OUT if name in index}
    with explain_load_errors(path):
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, **without, **models)
        check_tokenizers(pipeline, folder)
    if not exists(path):
        pipeline.register_to_config(_name_or_path=str(path))
    for key in (RESOLUTION, TIMESTEPS):
        if key in index:
            pipeline.register_to_config(**{key: index[key]})
    pool_pipeline_at_end_token(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.wadi_source = (folder, variant)
    with explain_move_errors(path, [file for part in weights.values() for file in part.files], dtype, device):
        return pipeline.to(device)


def _load_model(
    path: str | Path, folder: Path, component: str, index: Mapping[str, Any], weights: Weights, dtype: torch.dtype
) -> nn.Module:
    """Return one model of a pipeline, and check that it is complete and finite."""
    library, name = components(index)[component]
    settings, what = read_config(folder, component), f"The {component} of {str(path)!r}"
    for file in weights.files:
        with open_tensors(file) as stored:  # raises with the name of a damaged file
            if "quantization_config" not in settings:
                check_stored_floats(what, stored)
    model_class: Any = getattr(importlib.import_module(library), name)
    options = {"torch_dtype" if library == "diffusers" else "dtype": dtype, "variant": weights.variant}
    check_config(settings, f"{component}/config.json of {str(path)!r}")
    with explain_load_errors(path, component, weights.files, dtype):
        model: nn.Module = load_complete(model_class, str(folder / component), what, use_safetensors=True, **options)
        return model
