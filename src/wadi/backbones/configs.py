"""Read the configs of a pipeline without its weights, and build a network from its config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from wadi.backbones.load_errors import explain_load_errors
from wadi.backbones.weight_files import split_variant
from wadi.errors import WadiError, first_line
from wadi.io.quiet import errors_only
from wadi.io.records import read_json
from wadi.io.regular import exists

MOST_LAYERS = 1000
LARGEST = 10**10  # limit for all other whole numbers in a model's config
_LAYERS = re.compile(r"num_(\w+_)?(layers|blocks)|layers_per_block|\w+_layers_per_block|depth")


def pipeline_index(path: str | Path) -> dict[str, Any]:
    """Return the contents of a pipeline's ``model_index.json``, from a folder or a Hub id.

    Raises:
        WadiError: as `wadi.backbones.loading.load_pipeline`.
    """
    path, _ = split_variant(path)
    local = exists(path)
    if not local and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise WadiError(f"Teacher {str(path)!r} does not exist. Give a diffusers pipeline folder, or a Hub id 'owner/name'.")
    if local and not (Path(path) / "model_index.json").is_file():
        raise WadiError(
            f"Teacher {str(path)!r} is not a diffusers pipeline: it has no model_index.json. Give a folder written by "
            "pipeline.save_pretrained(). Convert a single-file checkpoint with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    with explain_load_errors(path, "model_index.json"):
        from diffusers import DiffusionPipeline

        index = dict(DiffusionPipeline.load_config(str(path)))
    if not isinstance(index.get("_class_name"), str):
        raise WadiError(
            f"model_index.json of {str(path)!r} has {index.get('_class_name')!r} under '_class_name'. It must name one "
            "pipeline class, such as 'StableDiffusionPipeline'."
        )
    return index


def read_config(path: str | Path, component: str) -> dict[str, Any]:
    """Return the config of a pipeline's component, without loading any weights.

    Raises:
        WadiError: as `wadi.backbones.loading.load_pipeline`.
    """
    path, _ = split_variant(path)
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    with explain_load_errors(path, f"{component}/{name}"):
        from huggingface_hub import hf_hub_download

        file = Path(path) / component / name if exists(path) else Path(hf_hub_download(str(path), name, subfolder=component))
        values: dict[str, Any] = read_json(file, dict[str, Any], "Config")
        return values


def build_network(config: dict[str, Any]) -> nn.Module:
    """Return a network built from its config, with freshly initialised weights (none under ``torch.device('meta')``).

    Raises:
        WadiError: if diffusers has no such class, or the class does not accept these settings.
    """
    import diffusers

    name = config.get("_class_name")
    network_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(network_class, type) and issubclass(network_class, diffusers.ModelMixin)):
        raise WadiError(f"A model's config has {name!r} under '_class_name'. It must name a model class of diffusers.")
    check_config(config, f"The config of {name}")
    try:
        with errors_only():
            network: Any = network_class.from_config(config)
            return network
    except Exception as error:  # each class raises its own type of error for a wrong setting
        raise WadiError(
            f"A {name} cannot be built from its config: {type(error).__name__}: {first_line(error)}. Compare its "
            "config.json with that of the original model."
        ) from error


def check_config(config: Mapping[str, Any], what: str) -> None:
    """Raise `WadiError` if a whole number in a model's config is so large that building the model would take for ever.

    Args:
        what: name of the config in the message.
    """
    for key, value in config.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, int):
                continue
            if abs(number) > LARGEST or (_LAYERS.fullmatch(key) and not 0 <= number <= MOST_LAYERS):
                raise WadiError(
                    f"{what} has {key}: {number if abs(number) < 10**30 else 'more than 10^30'}. The limit is "
                    f"{MOST_LAYERS if _LAYERS.fullmatch(key) else LARGEST}: correct the file."
                )
