"""Published weights: where they are, how they are read, and their digests. Nothing is ever unpickled."""

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

from wadi.errors import WadiError, first_line
from wadi.io.files import sha256, whole_file
from wadi.io.outputs import write_error
from wadi.io.regular import require_file
from wadi.io.user_cache import cache_folder
from wadi.io.weight_checks import shapes, tensor_differences

NOT_SETTINGS = ("transformers_version", "dtype", "torch_dtype", "architectures")  # who saved a config


def weights_file(path: str | Path | None, name: str, url: str, download: bool = False) -> Path:
    """Return the file of published weights: ``path``, or ``name`` in `cache_folder`.

    Args:
        download: whether to download the file to the cache folder if it is missing.
    Raises:
        WadiError: if the file is missing (the message has its URL and its place), or the download fails.
    """
    if path is not None:
        if not Path(path).is_file():
            raise WadiError(f"Weights {str(path)!r} do not exist. Give the file {name}, published at {url}")
        return Path(path)
    cached = cache_folder() / name
    if not cached.is_file():
        if not download:
            raise WadiError(f"The weights {name} are not on this machine. Download them from {url} to {cached}")
        _fetch(url, cached)
    return cached


def _fetch(url: str, to: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as stream, whole_file(to) as partial:
            shutil.copyfileobj(stream, partial)
    except urllib.error.URLError as error:
        raise WadiError(f"Cannot download {url} ({error.reason}). Download it in another way to {to}") from error
    except OSError as error:
        raise write_error(to, error) from error


def hub_file(repository: str, name: str) -> Path:
    """Return a single file of a Hub repository, from the local cache or downloaded.

    Raises:
        WadiError: if it is not cached and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    return Path(pretrained(lambda where: hf_hub_download(where, name), repository, f"a repository with the file {name}"))


def pretrained(load: Callable[[str], Any], name: str | Path, what: str) -> Any:
    """Return ``load(name)`` for a folder or Hub id, and turn its errors into one line.

    Args:
        what: a phrase for what ``name`` must be, for the message.
    Raises:
        WadiError: if it is not on this machine and cannot be downloaded, or is something else.
    """
    try:
        return load(str(name))
    except WadiError:
        raise
    except (OSError, ValueError, KeyError) as error:  # what transformers and the Hub client raise for absent or foreign files
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WadiError(
            f"{str(name)!r} cannot be loaded: {why} Give {what}: a folder, or the id of a Hub repository that is cached here "
            "or can be reached."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict in float32 from ``.safetensors``, or from a ``.pt`` or ``.pth`` file with nothing but tensors.

    Raises:
        WadiError: if the file cannot be read, or contains anything but tensors.
    """
    require_file(path, what="Weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(require_file(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's restricted reader and safetensors each have several classes of their own
        raise WadiError(
            f"Weights {str(path)!r} cannot be read: {first_line(error)}. Give a state dict of tensors, as .safetensors "
            "or as torch.save writes it."
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WadiError(f"Weights {str(path)!r} contain more than named tensors. Give a state dict.")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load exactly these tensors into a module.

    Args:
        what: a name of the weights, for the message.
    Raises:
        WadiError: if a tensor is missing, unknown, or of another shape.
    """
    expected = module.state_dict()
    if differences := tensor_differences(shapes(expected), shapes(state)):
        raise WadiError(f"{what} has another architecture: tensors {differences}. Give the published weights.")
    module.load_state_dict(state)


def digest(weights: torch.nn.Module | Path) -> str:
    """Return the SHA-256 of a file, or of a module's tensors in the order of their names and of the settings in its config.

    The settings count because two models of transformers with the same tensors can have different heads, activations or
    epsilons.
    """
    if isinstance(weights, Path):
        return sha256(weights)
    hasher = hashlib.sha256(_settings(weights))
    for name, tensor in sorted(weights.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _settings(module: torch.nn.Module) -> bytes:
    """Return the settings of a transformers model that are not defaults, without those about who saved it."""
    config = getattr(module, "config", None)
    settings = getattr(config, "to_diff_dict", None)
    return b"" if settings is None else json.dumps(_lasting_settings(settings()), sort_keys=True, default=str).encode()


def _lasting_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those that only say who saved the model, and how."""
    return {
        name: _lasting_settings(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in NOT_SETTINGS and not name.startswith("_")
    }
