"""From a folder or Hub id to a pipeline, and from a pipeline to its backbone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wadi.backbones.base import RESOLUTION, Backbone
from wadi.backbones.pooling import pool_pipeline_at_end_token
from wadi.errors import WadiError
from wadi.io.records import read_json

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
        WadiError: if no family serves the pipeline's class, its scheduler is of an unknown kind, or the model cannot draw at
            that resolution.
    """
    return family(type(pipeline).__name__)(pipeline, resolution)


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A text-to-image pipeline from a diffusers folder or a Hub id, in ``dtype`` on ``device``, without a safety checker.

    Raises:
        WadiError: if ``path`` is no pipeline folder, or a Hub id that cannot be reached, is gated or does not exist.
    """
    index = pipeline_index(path)
    without = {name: None for name in ("safety_checker", "feature_extractor") if name in index}
    with loading(path):
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(str(path), dtype=dtype, **without)
    _refuse_incomplete(path, pipeline)
    if RESOLUTION in index:
        pipeline.register_to_config(**{RESOLUTION: index[RESOLUTION]})
    pool_pipeline_at_end_token(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _refuse_incomplete(path: str | Path, pipeline: Any) -> None:
    """Raise `WadiError` if the files lacked tensors: diffusers leaves those without contents and only remarks on it."""
    for component, module in pipeline.components.items():
        lost = [name for name, tensor in module.named_parameters() if tensor.is_meta] if isinstance(module, nn.Module) else []
        if not lost:
            continue
        why = "Its files are incomplete. Expected all of them: fetch or save the pipeline anew."
        for file in (Path(path) / component).glob("*.safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt") as stored:
                if any(".base_layer." in name for name in stored.keys()):  # noqa: SIM118
                    why = (
                        "It was saved with an adapter attached, whose layers go by other names. Expected plain weights: merge "
                        "it (pipeline.fuse_lora() and pipeline.unload_lora_weights()) and save the pipeline anew."
                    )
        raise WadiError(f"Teacher {str(path)!r} lacks {len(lost)} tensors of its {component} (first: {lost[0]}). {why}")


def pipeline_index(path: str | Path) -> dict[str, Any]:
    """What a pipeline's ``model_index.json`` says; of a folder or a Hub id.

    Raises:
        WadiError: as `load_pipeline`.
    """
    local = Path(path).exists()
    if not local and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise WadiError(f"Teacher {str(path)!r} does not exist. Expected a diffusers pipeline folder or a Hub id 'owner/name'.")
    if local and not (Path(path) / "model_index.json").is_file():
        raise WadiError(
            f"Teacher {str(path)!r} is not a diffusers pipeline: it holds no model_index.json. Expected a folder written by "
            "pipeline.save_pretrained(); a single-file checkpoint is converted by "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    with loading(path):
        from diffusers import DiffusionPipeline

        return dict(DiffusionPipeline.load_config(str(path)))


def read_config(path: str | Path, component: str) -> dict[str, Any]:
    """The config of a pipeline's component, without any weight: its own JSON file.

    Raises:
        WadiError: as `load_pipeline`.
    """
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    with loading(path):
        from huggingface_hub import hf_hub_download

        local = Path(path) / component / name
        file = local if Path(path).exists() else Path(hf_hub_download(str(path), name, subfolder=component))
    values: dict[str, Any] = read_json(file, dict[str, Any], "Config")
    return values


def build_network(config: dict[str, Any]) -> nn.Module:
    """A network from its config, with whatever weights its layers start with (none under ``torch.device('meta')``).

    Raises:
        WadiError: if diffusers has no such class, or it does not take these settings.
    """
    with loading(f"a config of {config.get('_class_name')}"):
        import diffusers

        network: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        return network


def load_network(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[type[Backbone], Any]:
    """A pipeline's family and its network alone, on the CPU: no text encoder, no autoencoder.

    Raises:
        WadiError: as `load_pipeline`, or if no family serves the pipeline.
    """
    index = pipeline_index(path)
    backbone = family(str(index.get("_class_name")))
    with loading(path):
        import diffusers

        network_class = getattr(diffusers, index[backbone.component][1])
        return backbone, network_class.from_pretrained(str(path), subfolder=backbone.component, torch_dtype=dtype)


@contextmanager
def loading(path: object) -> Iterator[None]:
    """Within the block whatever a library raises becomes one line about ``path``: each has exception classes of its own."""
    try:
        with _quiet():
            yield
    except Exception as error:
        local = Path(str(path)).exists()
        where = "Its files are damaged or incomplete" if local else "The Hub could not deliver it"
        hint = "" if local else " Check the id, the network and, for a gated model, `hf auth login`; or give a local folder."
        raise WadiError(f"Teacher {str(path)!r} could not be loaded. {where}: {_first_line(error)}.{hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' bars and their advice at every load (safety checker, image processors): errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    verbosities = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
