"""Which files of a pipeline folder or Hub id hold its weights, by the rule that diffusers and transformers load with.

A component (``unet/``, ``text_encoder/``, ...) can hold several copies of its weights: one file or shards with an index, and
variants of both (``*.fp16.safetensors``). diffusers reads an index before a single file, transformers the single file first.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wadi.backbones.failures import loading
from wadi.errors import WadiError
from wadi.io.records import read_json
from wadi.io.regular import exists, open_regular

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # how their names of files begin
STEMS = {"diffusers": DIFFUSERS, "transformers": TRANSFORMERS}
# What `load_pipeline` leaves out of a pipeline.
LEFT_OUT = ("safety_checker", "feature_extractor")
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_ENDS = re.compile(
    r"(\.safetensors|\.(?P<single>[\w-]+?)\.safetensors|\.safetensors\.index\.json"
    r"|\.safetensors\.index\.(?P<index>[\w-]+)\.json|\.safetensors\.(?P<legacy>[\w-]+)\.index\.json)"
)


@dataclass(frozen=True)
class Weights:
    """The files of one component that are loaded. ``variant`` None is the plain copy."""

    variant: str | None
    files: tuple[Path, ...]


def copies(names: Iterable[str], stem: str = DIFFUSERS) -> dict[str | None, str]:
    """Return ``{variant: file name}`` of one component's weights, an index or a single file: of two the one that is loaded.

    ``names`` are those of the files in its folder.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        matched = _ENDS.fullmatch(name.removeprefix(stem)) if name.startswith(stem) else None
        if matched and not re.search(r"-\d{5}-of-\d{5}", name):  # a shard is no copy without its index
            variant = matched["single"] or matched["index"] or matched["legacy"]
            found.setdefault(variant, []).append(name)
    return {variant: min(names, key=_order) for variant, names in found.items()}


def _order(name: str) -> tuple[bool, bool]:
    """Sort the name that the library reads first to the front."""
    index_first = name.startswith(DIFFUSERS)
    return name.endswith(".json") != index_first, not re.search(r"\.index(\.[\w-]+)?\.json$", name)


def split_variant(source: str | Path) -> tuple[str | Path, str | None]:
    """Return ``(folder or Hub id, variant)`` of a teacher's name: ``owner/name?variant=fp16`` chooses the variant ``fp16``."""
    place, mark, variant = str(source).partition("?variant=")
    return (place, variant) if mark and variant and not exists(source) else (source, None)


def chosen(names: Iterable[str], variant: str | None, what: str, stem: str = DIFFUSERS) -> tuple[str | None, str]:
    """Return ``(variant, file name)`` of the weights to load among the file names of one component.

    Args:
        variant: the wanted one, such as ``"fp16"``; a component without it gives its plain copy, as in diffusers. None = the
            plain copy, or the only variant where there is no plain copy.
        what: name of the component in error messages.
        stem: how the library of the component names its files, `DIFFUSERS` or `TRANSFORMERS`.
    Raises:
        WadiError: if there is none, or several variants and no choice.
    """
    present = sorted(names)
    found = copies(present, stem)
    for wanted in (variant, None):
        if wanted in found:
            return wanted, found[wanted]
    if len(found) == 1 and variant is None:
        return next(iter(found.items()))
    if found:
        there = ", ".join(sorted(map(str, found)))
        problem = f"has only the variants {there} of its weights" + (f", not {variant!r}" if variant else "")
        raise WadiError(f"{what} {problem}. Write ?variant=NAME behind the folder or id.")
    if pickled := [name for name in present if name.endswith(PICKLED)]:
        raise WadiError(
            f"{what} has its weights only as {pickled[0]}, a pickle, which can run code when it is loaded. If you trust it, "
            "convert it: DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)."
        )
    raise WadiError(f"{what} has no .safetensors weights (files: {', '.join(present) or 'none'}). Download or save it again.")


def names_in(folder: Path) -> list[str]:
    """Return the names of the files in ``folder``.

    Raises:
        WadiError: if one cannot be read, or is a pipe or a device, which reading would wait for.
    """
    names = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir():
            open_regular(path).close()
            names.append(path.name)
    return names


def weights_in(folder: Path, variant: str | None = None, stem: str = DIFFUSERS) -> Weights:
    """Return the safetensors files that diffusers or transformers loads from the folder of a component.

    Args:
        variant, stem: see `chosen`.
    Raises:
        WadiError: if there are none, the index is damaged, or a shard is missing.
    """
    if not folder.is_dir():
        raise WadiError(f"{str(folder)!r} is not a folder. A pipeline keeps the weights of each model in a folder of its own.")
    picked, name = chosen(names_in(folder), variant, repr(str(folder)), stem)
    if not name.endswith(".json"):
        return Weights(picked, (folder / name,))
    shards = sorted(set(_weight_map(folder / name).values()))
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise WadiError(
            f"{str(folder / name)!r} names {len(shards)} shards; {len(absent)} do not exist (first: {absent[0]}). "
            "Download or save them again."
        )
    return Weights(picked, tuple(folder / shard for shard in shards))


def pipeline_weights(folder: Path, index: Mapping[str, Any], variant: str | None = None) -> dict[str, Weights]:
    """Return the `Weights` of each model of a pipeline folder, by component.

    Args:
        index: the contents of its ``model_index.json``.
        variant: see `chosen`.
    Raises:
        WadiError: as `weights_in`; if no model has the ``variant``.
    """
    models = {name: place for name, place in components(index).items() if place[0] in STEMS and _holds_weights(*place)}
    found = {name: weights_in(folder / name, variant, STEMS[library]) for name, (library, _) in models.items()}
    if variant is not None and found and all(weights.variant is None for weights in found.values()):
        raise WadiError(f"No model of {str(folder)!r} has the variant {variant!r}. Leave out ?variant=, or name another.")
    return found


def pipeline_folder(path: str | Path, variant: str | None = None) -> Path:
    """Return the folder of a pipeline; one on the Hub is downloaded, without copies of its weights that are not needed.

    Raises:
        WadiError: if the Hub does not deliver it.
    """
    path, named = split_variant(path)
    if exists(path):
        return Path(path)
    variant = variant or named
    with loading(path):
        from diffusers import DiffusionPipeline

        names = _hub_names(str(path))
        wanted = variant or _only_variant(names, components(DiffusionPipeline.load_config(str(path))))
        # A component that is passed as None is neither downloaded nor needed as safetensors.
        options: dict[str, Any] = {"use_safetensors": True if names else None, **dict.fromkeys(LEFT_OUT)}
        return Path(DiffusionPipeline.download(str(path), variant=wanted, **options))  # offline: what the cache has


def fetch(path: str, component: str, variant: str | None = None) -> Path:
    """Return the folder of a pipeline on the Hub, with the weights and config of one model downloaded.

    Raises:
        WadiError: if the Hub does not deliver them, or the model has no safetensors weights.
    """
    with loading(path, component):
        from huggingface_hub import snapshot_download

        own = [name.removeprefix(f"{component}/") for name in _hub_names(path) if name.startswith(f"{component}/")]
        if not own:
            return Path(snapshot_download(path, allow_patterns=[f"{component}/*.safetensors", f"{component}/*.json"]))
        _, name = chosen(own, variant, f"{component!r} of {path!r}")
        folder = Path(snapshot_download(path, allow_patterns=[f"{component}/{name}", f"{component}/config.json"]))
        if name.endswith(".json"):
            shards = set(_weight_map(folder / component / name).values())
            snapshot_download(path, allow_patterns=[f"{component}/{shard}" for shard in shards])
        return folder


def _hub_names(path: str) -> list[str]:
    """Return the names of the files in a Hub repository; none when the Hub cannot be reached, and the cache has to do."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(path)
    except Exception:  # whatever is wrong, the download that follows says it
        return []


def _only_variant(names: Iterable[str], parts: Collection[str]) -> str | None:
    """Return the variant of a repository that has some model in no other copy.

    Args:
        parts: names of the pipeline's components; files in other folders do not count.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder in parts:
            folders.setdefault(folder, []).append(file)
    for files in folders.values():
        for stem in STEMS.values():
            found = copies(files, stem)
            if len(found) == 1 and None not in found:
                return next(iter(found))
    return None


def _holds_weights(library: str, name: str) -> bool:
    """Whether a class of a pipeline's component is a model: schedulers, tokenizers and image processors are not."""
    from torch import nn

    found = getattr(importlib.import_module(library), name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor by the index of a sharded checkpoint."""
    try:
        found: dict[str, str] = read_json(index, dict[str, Any], "Index")["weight_map"]
        shards = set(found.values())
        if not shards or not all(isinstance(name, str) and name.endswith(".safetensors") for name in shards):
            raise ValueError("weight_map does not name .safetensors files")
        if any(Path(name).name != name for name in shards):
            raise ValueError("weight_map names files in other folders")
    except WadiError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WadiError(f"Index {str(index)!r} is damaged ({error}). Download or save it again.") from error
    return dict(found)


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return ``{component: (library, class name)}`` of a ``model_index.json``, without what is empty or left out.

    Raises:
        WadiError: if a component is of neither library and of no pipeline of diffusers.
    """
    found = {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(value)
        if not name.startswith("_") and name not in LEFT_OUT  # "_...": what we or diffusers note about the pipeline
    }
    for name, (library, _) in found.items():
        if library not in STEMS and not hasattr(importlib.import_module("diffusers.pipelines"), library):
            raise WadiError(
                f"Component {name!r} of the pipeline is of the library {library!r}. Supported are diffusers and transformers: "
                "use a pipeline made of their classes."
            )
    return found
