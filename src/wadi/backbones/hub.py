"""Download pipelines, or single models of them, from the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from wadi.backbones.load_errors import explain_load_errors
from wadi.backbones.weight_files import (
    LEFT_OUT,
    STEMS,
    choose_weights,
    components,
    split_variant,
    weight_copies,
    weight_map,
)
from wadi.errors import WadiError, first_line
from wadi.io.regular import exists


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` has the form ``owner/name`` of a repository on the Hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII) is not None


def adapter_folder(name: str | Path, files: Collection[str]) -> Path:
    """Return the folder of an adapter. If there is none, and ``name`` is a Hub id, ``files`` are downloaded and no others.

    Raises:
        WadiError: if it cannot be downloaded.
    """
    if exists(name) or not is_hub_id(str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download

    from wadi.io.quiet import errors_only

    try:
        with errors_only():
            return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:
        raise WadiError(
            f"Adapter {str(name)!r} is no folder, and could not be downloaded from the Hub: {first_line(error)}. Check the "
            "name, the network and, for a private repository, `hf auth login`."
        ) from error


def pipeline_folder(path: str | Path, variant: str | None = None) -> Path:
    """Return the folder of a pipeline. A pipeline on the Hub is downloaded, without the copies of its weights that are not
    used.

    Raises:
        WadiError: if it cannot be downloaded.
    """
    path, named = split_variant(path)
    if exists(path):
        return Path(path)
    variant = variant or named
    with explain_load_errors(path):
        from diffusers import DiffusionPipeline

        names = _hub_names(str(path))
        variant = variant or _only_variant(names, components(DiffusionPipeline.load_config(str(path))))
        # A component that is passed as None is not downloaded, and need not exist as safetensors.
        options: dict[str, Any] = {"use_safetensors": True if names else None, **dict.fromkeys(LEFT_OUT)}
        return Path(DiffusionPipeline.download(str(path), variant=variant, **options))  # offline: uses the local cache


def download_component(path: str, component: str, variant: str | None = None) -> Path:
    """Download the weights and config of one model of a pipeline on the Hub. Return the folder of the pipeline.

    Raises:
        WadiError: if they cannot be downloaded, or the model has no safetensors weights.
    """
    with explain_load_errors(path, component):
        from huggingface_hub import snapshot_download

        names = [name.removeprefix(f"{component}/") for name in _hub_names(path) if name.startswith(f"{component}/")]
        if not names:
            return Path(snapshot_download(path, allow_patterns=[f"{component}/*.safetensors", f"{component}/*.json"]))
        _, name = choose_weights(names, variant, f"{component!r} of {path!r}")
        folder = Path(snapshot_download(path, allow_patterns=[f"{component}/{name}", f"{component}/config.json"]))
        if name.endswith(".json"):
            shards = set(weight_map(folder / component / name).values())
            snapshot_download(path, allow_patterns=[f"{component}/{shard}" for shard in shards])
        return folder


def _hub_names(path: str) -> list[str]:
    """Return the names of the files in a Hub repository; none if the Hub cannot be reached. Then the local cache is used."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(path)
    except Exception:  # the download that follows will report the error
        return []


def _only_variant(names: Iterable[str], folders: Collection[str]) -> str | None:
    """Return a variant that must be loaded because some model of a repository has no other copy of its weights.

    Args:
        names: names of the files in the repository.
        folders: names of the pipeline's components. Files in other folders do not count.
    """
    by_folder: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder in folders:
            by_folder.setdefault(folder, []).append(file)
    for files in by_folder.values():
        for stem in STEMS.values():
            copies = weight_copies(files, stem)
            if len(copies) == 1 and None not in copies:
                return next(iter(copies))
    return None
