"""Find the weight files of a pipeline folder, by the rules of diffusers and transformers.

A component (``unet/``, ``text_encoder/``, ...) can have several copies of its weights: a single file, or shards with an index,
and variants of both (``*.fp16.safetensors``). If a component has an index and a single file, diffusers reads the index and
transformers the single file.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi.errors import WadiError
from wadi.io.records import read_json
from wadi.io.regular import exists, open_regular

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # the first part of the names of their files
STEMS = {"diffusers": DIFFUSERS, "transformers": TRANSFORMERS}
LEFT_OUT = ("safety_checker", "feature_extractor")  # components that `load_pipeline` does not load
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_ENDS = re.compile(
    r"(\.safetensors|\.(?P<single>[\w-]+?)\.safetensors|\.safetensors\.index\.json"
    r"|\.safetensors\.index\.(?P<index>[\w-]+)\.json|\.safetensors\.(?P<legacy>[\w-]+)\.index\.json)"
)


@dataclass(frozen=True)
class Weights:
    """The files of one component that are loaded. ``variant`` is None for the plain copy."""

    variant: str | None
    files: tuple[Path, ...]


def split_variant(source: str | Path) -> tuple[str | Path, str | None]:
    """Return ``(folder or Hub id, variant)`` of a teacher's name: ``owner/name?variant=fp16`` chooses the variant ``fp16``."""
    place, mark, variant = str(source).partition("?variant=")
    return (place, variant) if mark and variant and not exists(source) else (source, None)


def weight_copies(names: Iterable[str], stem: str = DIFFUSERS) -> dict[str | None, str]:
    """Return ``{variant: file name}`` of one component's weights. Of an index and a single file, the one that is loaded.

    Args:
        names: names of the files in the component's folder.
        stem: see `choose_weights`.
    """
    by_variant: dict[str | None, list[str]] = {}
    for name in names:
        match = _ENDS.fullmatch(name.removeprefix(stem)) if name.startswith(stem) else None
        if match and not re.search(r"-\d{5}-of-\d{5}", name):  # a shard without its index is not a copy
            variant = match["single"] or match["index"] or match["legacy"]
            by_variant.setdefault(variant, []).append(name)
    return {variant: min(names, key=_reading_order) for variant, names in by_variant.items()}


def _reading_order(name: str) -> tuple[bool, bool]:
    """Sort key: the name that the library reads first comes first."""
    index_first = name.startswith(DIFFUSERS)
    return name.endswith(".json") != index_first, not re.search(r"\.index(\.[\w-]+)?\.json$", name)


def choose_weights(names: Iterable[str], variant: str | None, what: str, stem: str = DIFFUSERS) -> tuple[str | None, str]:
    """Return ``(variant, file name)`` of the weights to load, from the file names of one component.

    Args:
        variant: the variant to load, such as ``"fp16"``. A component without it loads its plain copy, as in diffusers. None =
            the plain copy, or the only variant of a component without a plain copy.
        what: name of the component in error messages.
        stem: first part of the file names in the component's library, `DIFFUSERS` or `TRANSFORMERS`.
    Raises:
        WadiError: if the component has no weights, or several variants and none was chosen.
    """
    present = sorted(names)
    copies = weight_copies(present, stem)
    for candidate in (variant, None):
        if candidate in copies:
            return candidate, copies[candidate]
    if len(copies) == 1 and variant is None:
        return next(iter(copies.items()))
    if copies:
        variants = ", ".join(sorted(map(str, copies)))
        problem = f"has only the variants {variants} of its weights" + (f", not {variant!r}" if variant else "")
        raise WadiError(f"{what} {problem}. Write ?variant=NAME after the folder or id.")
    if pickled := [name for name in present if name.endswith(PICKLED)]:
        raise WadiError(
            f"{what} has its weights only as {pickled[0]}, a pickle, which can run code when it is loaded. If you trust it, "
            "convert it: DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)."
        )
    raise WadiError(f"{what} has no .safetensors weights (files: {', '.join(present) or 'none'}). Download or save it again.")


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of the files in ``folder``; none if it does not exist.

    Raises:
        WadiError: if a file cannot be read, or is a pipe or a device: reading it could block for ever.
    """
    names = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir():
            open_regular(path).close()
            names.append(path.name)
    return names


def component_weights(folder: Path, variant: str | None = None, stem: str = DIFFUSERS) -> Weights:
    """Return the safetensors files that diffusers or transformers loads from the folder of a component.

    Args:
        variant, stem: see `choose_weights`.
    Raises:
        WadiError: if there are none, the index is damaged, or a shard is missing.
    """
    if not folder.is_dir():
        raise WadiError(f"{str(folder)!r} is not a folder. A pipeline has one folder per model, with its weights.")
    chosen, name = choose_weights(file_names(folder), variant, repr(str(folder)), stem)
    if not name.endswith(".json"):
        return Weights(chosen, (folder / name,))
    shards = sorted(set(weight_map(folder / name).values()))
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise WadiError(
            f"{str(folder / name)!r} names {len(shards)} shards; {len(absent)} do not exist (first: {absent[0]}). "
            "Download or save them again."
        )
    return Weights(chosen, tuple(folder / shard for shard in shards))


def pipeline_weights(folder: Path, index: Mapping[str, Any], variant: str | None = None) -> dict[str, Weights]:
    """Return the `Weights` of each model of a pipeline folder, by component.

    Args:
        index: the contents of its ``model_index.json``.
        variant: see `choose_weights`.
    Raises:
        WadiError: as `component_weights`; or if no model has the ``variant``.
    """
    models = {name: place for name, place in components(index).items() if place[0] in STEMS and _is_model(*place)}
    weights = {name: component_weights(folder / name, variant, STEMS[library]) for name, (library, _) in models.items()}
    if variant is not None and weights and all(files.variant is None for files in weights.values()):
        raise WadiError(f"No model of {str(folder)!r} has the variant {variant!r}. Leave out ?variant=, or name another.")
    return weights


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return ``{component: (library, class name)}`` of a ``model_index.json``, without empty and left-out components.

    Raises:
        WadiError: if a component is neither from diffusers nor from transformers.
    """
    parts = {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(value)
        if not name.startswith("_") and name not in LEFT_OUT  # "_...": notes of diffusers or ours about the pipeline
    }
    for name, (library, _) in parts.items():
        if library not in STEMS and not hasattr(importlib.import_module("diffusers.pipelines"), library):
            raise WadiError(
                f"Component {name!r} of the pipeline is from the library {library!r}. Only diffusers and transformers are "
                "supported: use a pipeline of their classes."
            )
    return parts


def _is_model(library: str, name: str) -> bool:
    """Return whether a component's class is a model. Schedulers, tokenizers and image processors are not."""
    from torch import nn

    component_class = getattr(importlib.import_module(library), name, None)
    return isinstance(component_class, type) and issubclass(component_class, nn.Module)


def weight_map(index: Path) -> dict[str, str]:
    """Return ``{tensor: file name}`` from the index of a sharded checkpoint.

    Raises:
        WadiError: if the index is damaged, or names other files than ``.safetensors`` files in its own folder.
    """
    try:
        names: dict[str, str] = read_json(index, dict[str, Any], "Index")["weight_map"]
        shards = set(names.values())
        if not shards or not all(isinstance(name, str) and name.endswith(".safetensors") for name in shards):
            raise ValueError("weight_map does not name .safetensors files")
        if any(Path(name).name != name for name in shards):
            raise ValueError("weight_map names files in other folders")
    except WadiError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WadiError(f"Index {str(index)!r} is damaged ({error}). Download or save it again.") from error
    return dict(names)
