"""From a folder or Hub id to a pipeline, and from a pipeline to its backbone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wadi.backbones.base import Backbone
from wadi.errors import WadiError

# Pipeline class name -> "module:class" of its backbone. Imported on use, so that one family's needs are not everyone's.
_FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "wadi.backbones.sd:StableDiffusion",
}


def register_family(pipeline_class: str, backbone: str) -> None:
    """Serve pipelines of class ``pipeline_class`` with ``backbone``, given as ``"module:class"``."""
    _FAMILIES[pipeline_class] = backbone


def from_pipeline(pipeline: Any) -> Backbone:
    """The backbone of a loaded pipeline.

    Raises:
        WadiError: if no family serves the pipeline's class, or the network already carries an adapter.
    """
    name = type(pipeline).__name__
    if name not in _FAMILIES:
        raise WadiError(
            f"The teacher is a {name}, which no family serves. Expected one of {', '.join(sorted(_FAMILIES))}; "
            "a new family is one file: see docs/add-a-family.md."
        )
    module, _, attribute = _FAMILIES[name].partition(":")
    backbone: Backbone = getattr(importlib.import_module(module), attribute)(pipeline)
    return backbone


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """A text-to-image pipeline from a diffusers folder or a Hub id, in ``dtype`` on ``device``, without a safety checker.

    Raises:
        WadiError: if ``path`` is no pipeline folder, or a Hub id that cannot be reached, is gated or does not exist.
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
    try:
        with _quiet():
            from diffusers import DiffusionPipeline

            index = DiffusionPipeline.load_config(str(path))
            without = {name: None for name in ("safety_checker", "feature_extractor") if name in index}
            pipeline = DiffusionPipeline.from_pretrained(str(path), dtype=dtype, **without)
    except Exception as error:  # the Hub, safetensors and transformers each raise classes of their own
        where = "Its files are damaged or incomplete" if local else "The Hub could not deliver it"
        hint = "" if local else " Check the id, the network and, for a gated model, `hf auth login`; or give a local folder."
        raise WadiError(f"Teacher {str(path)!r} could not be loaded. {where}: {_first_line(error)}.{hint}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


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
