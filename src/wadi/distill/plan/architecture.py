"""Model architectures from config files: those of the presets, from ``architectures/``, and that of any pipeline. No weights.

The files in ``architectures/`` have the public values of the models' own config files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wadi.backbones import family
from wadi.backbones.configs import build_network, check_config, pipeline_index, read_config
from wadi.errors import WadiError, first_line, short_repr
from wadi.io.quiet import errors_only
from wadi.io.records import read_json
from wadi.zoo.paths import resolve_teacher

FOLDER = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Architecture:
    """The config files of a model.

    Attributes:
        model: name, folder or Hub id.
        pipeline: class of the pipeline.
        vae_scale_factor: pixels per latent along each side.
        network, scheduler: their configs.
        other_parameters: number of parameters of each text encoder and of the autoencoder, which are in memory as well.
    """

    model: str
    pipeline: str
    vae_scale_factor: int
    network: dict[str, Any]
    scheduler: dict[str, Any]
    other_parameters: dict[str, int]


def known_architectures() -> list[str]:
    """Return the names of the architectures that come with the package. Presets of the same name use them."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_architecture(name: str) -> Architecture:
    """Return one of `known_architectures`."""
    architecture: Architecture = read_json(FOLDER / f"{name}.json", Architecture, "Architecture")
    return architecture


def read_architecture(teacher: str) -> Architecture:
    """Return the architecture of a pipeline folder or Hub id from its config files.

    Raises:
        WadiError: if it is not a pipeline, its family is not supported, a config is damaged, or the download fails.
    """
    path = resolve_teacher(teacher)
    index = pipeline_index(path)
    backbone = family(str(index.get("_class_name")))
    names = sorted(name for name in index if re.match(r"text_encoder|vae", name))
    components = {name: entry for name in names if (entry := _component(teacher, name, index[name])) is not None}
    return Architecture(
        model=teacher,
        pipeline=str(index["_class_name"]),
        vae_scale_factor=backbone.autoencoder_scale(read_config(path, "vae")),
        network=read_config(path, backbone.component),
        scheduler=read_config(path, "scheduler"),
        other_parameters={name: _count_parameters(path, name, *entry) for name, entry in components.items()},
    )


def _component(teacher: str, name: str, value: Any) -> tuple[str, str] | None:
    """Return ``(library, class)`` of an entry of ``model_index.json``; None if the component is absent or it is a setting.

    Raises:
        WadiError: if the entry is malformed.
    """
    if not isinstance(value, (list, tuple)) or (len(value) == 2 and value[0] is None):
        return None
    if len(value) == 2 and all(isinstance(word, str) for word in value):
        return value[0], value[1]
    raise WadiError(
        f"model_index.json of {teacher!r} has {short_repr(value)} under {name!r}. It must name a library and a class."
    )


def _count_parameters(path: str, component: str, library: str, class_name: str) -> int:
    """Return the number of parameters of a text encoder or autoencoder, built from its config on the meta device.

    Raises:
        WadiError: if the library has no such class, or the class rejects the config.
    """
    config = read_config(path, component)
    if library == "diffusers":
        with torch.device("meta"):
            model: Any = build_network({**config, "_class_name": class_name})
    else:
        import transformers

        check_config(config, f"The config of {component}")
        model_class = getattr(transformers, class_name, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise WadiError(
                f"model_index.json of {path!r} names {class_name!r} for {component}. It must be a model of transformers."
            )
        try:
            with torch.device("meta"), errors_only():
                config_class: Any = model_class.config_class
                model = model_class(config_class(**config))
        except Exception as error:  # each class raises errors of its own
            raise WadiError(
                f"The {component} of {path!r} cannot be built from its config: {type(error).__name__}: {first_line(error)}. "
                "Compare its config.json with that of the original model."
            ) from error
    return sum(parameter.numel() for parameter in model.parameters())
