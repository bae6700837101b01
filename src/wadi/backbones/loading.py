"""From a folder or Hub id to a pipeline, and from a pipeline to its backbone."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wadi.backbones.base import RESOLUTION, Backbone
from wadi.backbones.failures import first_line, loading, moving
from wadi.backbones.pooling import pool_pipeline_at_end_token
from wadi.backbones.stored import LEFT_OUT, Weights, components, names_in, pipeline_folder, pipeline_weights, split_variant
from wadi.backbones.tokenizers import refuse_absent_files, refuse_misfits
from wadi.errors import WadiError
from wadi.io.records import read_json
from wadi.io.regular import exists
from wadi.io.weights import load_complete, opened, quiet, refuse_whole_weights

MOST_LAYERS = 1000
LARGEST = 10**10  # of any other whole number in a model's config
_LAYERS = re.compile(r"num_(\w+_)?(layers|blocks)|layers_per_block|\w+_layers_per_block|depth")

# Pipeline class name -> "module:class" of its backbone. Imported on use, so that one family's needs are not everyone's.
_FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "wadi.backbones.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "wadi.backbones.sdxl:StableDiffusionXL",
    "PixArtAlphaPipeline": "wadi.backbones.pixart:PixArt",
    "PixArtSigmaPipeline": "wadi.backbones.pixart:PixArt",
    "StableDiffusion3Pipeline": "wadi.backbones.sd3:StableDiffusion3",
    "FluxPipeline": "wadi.backbones.flux:Flux",
    "SanaPipeline": "wadi.backbones.sana:Sana",
}


def register_family(pipeline_class: str, backbone: str) -> None:
    """Serve pipelines of class ``pipeline_class`` with ``backbone``, given as ``"module:class"``."""
    _FAMILIES[pipeline_class] = backbone


def family(pipeline_class: str) -> type[Backbone]:
    """The backbone class that serves pipelines of class ``pipeline_class``.

    Raises:
        WadiError: if there is none.
    """
    if pipeline_class not in _FAMILIES:
        raise WadiError(
            f"The teacher is a {pipeline_class}, which no family serves. Expected one of {', '.join(sorted(_FAMILIES))}; "
            "a new family is one file: see docs/add-a-family.md."
        )
    module, _, attribute = _FAMILIES[pipeline_class].partition(":")
    found: type[Backbone] = getattr(importlib.import_module(module), attribute)
    return found


def from_pipeline(pipeline: Any, resolution: tuple[int, int] | None = None) -> Backbone:
    """The backbone of a loaded pipeline, at ``resolution`` ``(height, width)`` in pixels or the model's own.

    Raises:
        WadiError: if no family serves the pipeline's class, its scheduler is of an unknown kind, its configuration has values
            that cannot be used, or the model cannot generate at that resolution.
    """
    backbone = family(type(pipeline).__name__)
    try:
        return backbone(pipeline, resolution)
    except WadiError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise WadiError(
            f"The configuration of this {type(pipeline).__name__} cannot be used: {type(error).__name__}: {first_line(error)}. "
            "Compare the config.json of its models and its scheduler_config.json with those of the original pipeline."
        ) from error


def load_pipeline(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Any:
    """A text-to-image pipeline from a diffusers folder or a Hub id, in ``dtype`` on ``device``, without a safety checker.

    Every tensor of its models is read from its files, every value is finite, and its tokenizers have their vocabularies.

    Args:
        path: ``?variant=fp16`` behind it chooses a copy of the weights, as ``variant`` does.
        variant: which copy of the weights, such as ``"fp16"``; None = the plain one, or the only variant that is there.
    Raises:
        WadiError: if ``path`` is no pipeline folder, or a Hub id that cannot be reached, is gated or does not exist; if a
            model lacks tensors or has values that are not finite; if a tokenizer has no vocabulary.
    """
    path, named = split_variant(path)
    variant = variant or named
    index = pipeline_index(path)
    folder = pipeline_folder(path, variant)
    weights = pipeline_weights(folder, index, variant)
    for component in components(index):
        names_in(folder / component)  # refuses what is not a regular file
    refuse_absent_files(index, folder)
    models = {name: _model(path, folder, name, index, part, dtype) for name, part in weights.items()}
    without = {name: None for name in LEFT_OUT if name in index}
    with loading(path):
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, **without, **models)
        refuse_misfits(pipeline, folder)
    if not exists(path):
        pipeline.register_to_config(_name_or_path=str(path))
    if RESOLUTION in index:
        pipeline.register_to_config(**{RESOLUTION: index[RESOLUTION]})
    pool_pipeline_at_end_token(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.wadi_source = (folder, variant)
    with moving(path, [file for part in weights.values() for file in part.files], dtype, device):
        return pipeline.to(device)


def _model(
    path: str | Path, folder: Path, component: str, index: Mapping[str, Any], weights: Weights, dtype: torch.dtype
) -> nn.Module:
    """One model of a pipeline, complete and finite."""
    library, name = components(index)[component]
    settings, what = read_config(folder, component), f"The {component} of {str(path)!r}"
    for file in weights.files:
        with opened(file) as stored:  # names the file that is damaged
            if "quantization_config" not in settings:
                refuse_whole_weights(what, stored)
    model_class: Any = getattr(importlib.import_module(library), name)
    options = {"torch_dtype" if library == "diffusers" else "dtype": dtype, "variant": weights.variant}
    check_config(settings, f"{component}/config.json of {str(path)!r}")
    with loading(path, component, weights.files, dtype):
        model: nn.Module = load_complete(model_class, str(folder / component), what, use_safetensors=True, **options)
        return model


def pipeline_index(path: str | Path) -> dict[str, Any]:
    """What a pipeline's ``model_index.json`` says; of a folder or a Hub id.

    Raises:
        WadiError: as `load_pipeline`.
    """
    path, _ = split_variant(path)
    local = exists(path)
    if not local and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise WadiError(f"Teacher {str(path)!r} does not exist. Expected a diffusers pipeline folder or a Hub id 'owner/name'.")
    if local and not (Path(path) / "model_index.json").is_file():
        raise WadiError(
            f"Teacher {str(path)!r} is not a diffusers pipeline: it holds no model_index.json. Expected a folder written by "
            "pipeline.save_pretrained(); a single-file checkpoint is converted by "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    with loading(path, "model_index.json"):
        from diffusers import DiffusionPipeline

        index = dict(DiffusionPipeline.load_config(str(path)))
    if not isinstance(index.get("_class_name"), str):
        raise WadiError(
            f"model_index.json of {str(path)!r} has {index.get('_class_name')!r} under '_class_name'. It must name one "
            "pipeline class, such as 'StableDiffusionPipeline'."
        )
    return index


def read_config(path: str | Path, component: str) -> dict[str, Any]:
    """The config of a pipeline's component, without any weight: its own JSON file.

    Raises:
        WadiError: as `load_pipeline`.
    """
    path, _ = split_variant(path)
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    with loading(path, f"{component}/{name}"):
        from huggingface_hub import hf_hub_download

        file = Path(path) / component / name if exists(path) else Path(hf_hub_download(str(path), name, subfolder=component))
        values: dict[str, Any] = read_json(file, dict[str, Any], "Config")
        return values


def build_network(config: dict[str, Any]) -> nn.Module:
    """A network from its config, with whatever weights its layers start with (none under ``torch.device('meta')``).

    Raises:
        WadiError: if diffusers has no such class, or it does not take these settings.
    """
    import diffusers

    name = config.get("_class_name")
    network_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(network_class, type) and issubclass(network_class, diffusers.ModelMixin)):
        raise WadiError(f"A model's config has {name!r} under '_class_name'. It must name a model class of diffusers.")
    check_config(config, f"The config of {name}")
    try:
        with quiet():
            network: Any = network_class.from_config(config)
            return network
    except Exception as error:  # each class has its own way to refuse a setting
        raise WadiError(
            f"A {name} cannot be built from its config: {type(error).__name__}: {first_line(error)}. Compare its "
            "config.json with that of the original model."
        ) from error


def check_config(config: Mapping[str, Any], what: str) -> None:
    """Raise `WadiError` if a whole number in a model's config is out of all proportion: building it would take for ever.

    Args:
        what: name of the config in the message.
    """
    for key, value in config.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, int):
                continue
            if abs(number) > LARGEST or (_LAYERS.fullmatch(key) and not 0 <= number <= MOST_LAYERS):
                raise WadiError(
                    f"{what} has {key}: {number if abs(number) < 10**30 else 'more than 10^30'}. At most "
                    f"{MOST_LAYERS if _LAYERS.fullmatch(key) else LARGEST} is supported: correct the file."
                )
