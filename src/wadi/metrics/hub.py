"""Weights that others publish: where they are looked for, how they are read, and their digests. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import shutil
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wadi.errors import WadiError
from wadi.io.digests import cache_folder
from wadi.io.files import sha256, unwritable, whole_file
from wadi.io.regular import regular

NOT_SETTINGS = ("transformers_version", "dtype", "torch_dtype", "architectures")  # of a config: who saved it, and how


def weights_file(path: str | Path | None, name: str, url: str, download: bool = False) -> Path:
    """A file of published weights: ``path``, or ``name`` in `cache_folder`, fetched there first if ``download`` allows it.

    Raises:
        WadiError: if it is in neither place, saying where it can be fetched and where to put it; or if fetching fails.
    """
    if path is not None:
        if not Path(path).is_file():
            raise WadiError(f"Weights {str(path)!r} do not exist. Expected the file {name}, published at {url}")
        return Path(path)
    kept = cache_folder() / name
    if not kept.is_file():
        if not download:
            raise WadiError(f"The weights {name} are not on this machine. Fetch them from {url} and put them at {kept}")
        _fetch(url, kept)
    return kept


def _fetch(url: str, to: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as stream, whole_file(to) as partial:
            shutil.copyfileobj(stream, partial)
    except urllib.error.URLError as error:
        raise WadiError(f"Cannot fetch {url} ({error.reason}). Fetch it by other means and put it at {to}") from error
    except OSError as error:
        raise unwritable(to, error) from error


def hub_file(repository: str, name: str) -> Path:
    """A single file of a Hub repository, from the local cache or fetched.

    Raises:
        WadiError: if it is not cached and cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    return Path(pretrained(lambda where: hf_hub_download(where, name), repository, f"the file {name} of it"))


def pretrained(load: Callable[[str], Any], name: str | Path, expected: str) -> Any:
    """``load(name)`` of a folder or Hub id, its failures told in one line.

    Raises:
        WadiError: if it is not on this machine and cannot be fetched, or is something else.
    """
    try:
        return load(str(name))
    except WadiError:
        raise
    except (OSError, ValueError, KeyError) as error:  # what transformers and the Hub client raise for absent or foreign files
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WadiError(
            f"{str(name)!r} cannot be loaded: {why} Expected {expected}: a folder with it, or the id of a Hub repository that "
            "is cached here or can be reached."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A flat state dict in float32 from ``.safetensors``, or from a ``.pt`` or ``.pth`` that holds tensors alone.

    Raises:
        WadiError: if it cannot be read as such, or holds anything but tensors.
    """
    regular(path, what="Weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(regular(path))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's restricted reader and safetensors each have several classes of their own
        raise WadiError(
            f"Weights {str(path)!r} cannot be read: {str(error).splitlines()[0]} Expected a state dict of tensors, as "
            ".safetensors or as torch.save writes it."
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WadiError(f"Weights {str(path)!r} hold something other than tensors by name. Expected a state dict.")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give a module exactly these tensors.

    Raises:
        WadiError: if one is missing, unknown or of another shape.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    told = [
        f"{len(names)} {kind} (first: {names[0]})"
        for names, kind in ((missing, "missing"), (unknown, "unknown"), (reshaped, "of another shape"))
        if names
    ]
    if told:
        raise WadiError(f"{what} is of another architecture: tensors {', '.join(told)}. Expected the published weights.")
    module.load_state_dict(state)


def digest(weights: torch.nn.Module | Path) -> str:
    """SHA-256 of a file's bytes, or of a module's tensors in the order of their names and of its config's settings.

    Two models of transformers with the same tensors differ if one has other heads, activations or epsilons.
    """
    if isinstance(weights, Path):
        return sha256(weights)
    found = hashlib.sha256(_settings(weights))
    for name, tensor in sorted(weights.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _settings(module: torch.nn.Module) -> bytes:
    """The settings of a model of transformers that are not the defaults, without what says who saved it; else nothing."""
    config = getattr(module, "config", None)
    settings = getattr(config, "to_diff_dict", None)
    return b"" if settings is None else json.dumps(_kept(settings()), sort_keys=True, default=str).encode()


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _kept(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in NOT_SETTINGS and not name.startswith("_")
    }
