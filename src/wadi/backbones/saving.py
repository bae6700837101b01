"""Save pipelines so that they load without this package, in any dtype, with the line of Python that `loading_line` returns."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from wadi.backbones.base import Backbone
from wadi.backbones.registry import from_pipeline
from wadi.io.files import whole_folder
from wadi.io.quiet import errors_only
from wadi.io.records import read_json
from wadi.io.regular import exists

NAMES_OF_SOURCES = ("_name_or_path", "name_or_path")


def save_pipeline(pipeline: Any, out: Path) -> None:
    """Write a pipeline to the folder ``out``, completely or not at all.

    Raises:
        WadiError: if the folder cannot be written.
    """
    with whole_folder(out) as folder:
        write_pipeline(pipeline, folder)


def write_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline into an existing ``folder``."""
    with errors_only():
        pipeline.save_pretrained(folder, safe_serialization=True)
    for component, model in pipeline.components.items():
        if isinstance(model, torch.nn.Module) and type(model).__module__.startswith("transformers."):
            load_in_float32(folder / component / "config.json")
    for config in folder.rglob("*.json"):
        remove_paths(config)


def remove_paths(config: Path) -> None:
    """Remove the paths from which diffusers and transformers loaded a model out of its config. Hub ids stay."""
    values = read_json(config, Any, "Config")
    if isinstance(values, dict) and (own := [key for key in NAMES_OF_SOURCES if _is_path(values.get(key))]):
        for key in own:
            del values[key]
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_path(source: object) -> bool:
    return isinstance(source, str) and (os.path.isabs(source) or exists(source))


def load_in_float32(config: Path) -> None:
    """Change a text encoder's config so that a plain load gives float32, as for the other models of a pipeline.

    transformers 5 loads in the dtype that the config names, but a U-Net in float32 cannot read embeddings in float16.
    """
    values = read_json(config, dict[str, Any], "Config") | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def call_text(backbone: Backbone, steps: int) -> str:
    """Return the arguments of a plain call that generates ``prompt`` in ``steps`` steps, as Python code.

    The first argument of some pipelines is not the prompt, so it is named there.
    """
    first = next(name for name in inspect.signature(type(backbone.pipeline).__call__).parameters if name != "self")
    others = "".join(f", {name}={value}" for name, value in backbone.call.items())
    return f"{'' if first == 'prompt' else 'prompt='}prompt, num_inference_steps={steps}{others}"


def loading_line(pipeline: Any, out: Path) -> str:
    """Return Python code that loads the pipeline from ``out`` in its dtype and generates ``prompt`` in the student's steps."""
    backbone = from_pipeline(pipeline)
    dtype = backbone.network.dtype
    dtype_argument = "" if dtype == torch.float32 else f", torch_dtype={dtype}"
    call = call_text(backbone, len(backbone.student_timesteps))
    return f"DiffusionPipeline.from_pretrained({str(out)!r}{dtype_argument})({call})"
